"""Where options come from, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from alknet_firewall import ConfigError, Firewall, FirewallConfig, Thresholds
from alknet_firewall.detector import EMBEDDED


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write the configuration file that ``ALKNET_CONFIG`` names."""
    path = tmp_path / "alknet.toml"
    monkeypatch.setenv("ALKNET_CONFIG", str(path))

    def write(text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def _no_instruction_set(monkeypatch):
    """The one variable that other tests keep is a setting here."""
    monkeypatch.delenv("ALKNET_ISA", raising=False)


def test_defaults():
    config = FirewallConfig.load()
    assert config == FirewallConfig()
    assert config.detector == EMBEDDED
    assert config.thresholds == Thresholds(0.3, 0.7)
    assert config.on_error == "raise"


class TestPrecedence:
    def test_file_over_defaults(self, file):
        file('detector = "mine"\nmax_tokens = 5\n[thresholds]\nsuspicious = 0.1\n')
        config = FirewallConfig.load()
        assert (config.detector, config.max_tokens) == ("mine", 5)
        assert config.thresholds == Thresholds(0.1, 0.7)

    def test_environment_over_file(self, file, monkeypatch):
        file('detector = "mine"\nthreads = 3\n[thresholds]\nsuspicious = 0.1\ndangerous = 0.2\n')
        monkeypatch.setenv("ALKNET_DETECTOR", "theirs")
        monkeypatch.setenv("ALKNET_DANGEROUS", "0.9")
        config = FirewallConfig.load()
        assert (config.detector, config.threads) == ("theirs", 3)
        assert config.thresholds == Thresholds(0.1, 0.9)

    def test_arguments_over_environment(self, file, monkeypatch):
        file('engine = "native"\n')
        monkeypatch.setenv("ALKNET_ENGINE", "native")
        monkeypatch.setenv("ALKNET_MAX_TOKENS", "100")
        monkeypatch.setenv("ALKNET_SUSPICIOUS", "0.05")
        config = FirewallConfig.load(engine="candle", thresholds=Thresholds(0.2, 0.6))
        assert (config.engine, config.max_tokens) == ("candle", 100)
        assert config.thresholds == Thresholds(0.2, 0.6)

    def test_an_argument_that_is_none_is_not_given(self, monkeypatch):
        monkeypatch.setenv("ALKNET_THREADS", "2")
        assert FirewallConfig.load(threads=None).threads == 2

    def test_an_empty_variable_is_not_set(self, monkeypatch):
        monkeypatch.setenv("ALKNET_THREADS", "")
        assert FirewallConfig.load().threads is None

    def test_the_users_file_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        (tmp_path / "alknet-firewall").mkdir()
        (tmp_path / "alknet-firewall" / "config.toml").write_text("max_tokens = 7\n")
        assert FirewallConfig.load().max_tokens == 7

    @pytest.mark.parametrize("home", [None, "/dev/null"])
    def test_without_a_home_there_is_no_file(self, monkeypatch, home):
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # A user that the system does not know.
        if home is None:
            monkeypatch.delenv("HOME", raising=False)
        else:
            monkeypatch.setenv("HOME", home)
        assert FirewallConfig.load() == FirewallConfig()

    def test_variables_that_are_not_options(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ALKNET_HOME", str(tmp_path))
        assert FirewallConfig.load() == FirewallConfig()

    def test_a_firewall_takes_what_was_loaded(self, tiny_folder, monkeypatch):
        monkeypatch.setenv("ALKNET_DETECTOR", str(tiny_folder))
        monkeypatch.setenv("ALKNET_MAX_TOKENS", "12")
        firewall = Firewall(threads=1)
        assert firewall.detector == "tiny"
        assert (firewall.config.max_tokens, firewall.config.threads) == (12, 1)

    def test_a_whole_configuration_ignores_the_environment(self, tiny_folder, monkeypatch):
        monkeypatch.setenv("ALKNET_MAX_TOKENS", "12")
        config = FirewallConfig(detector=str(tiny_folder))
        assert Firewall(config=config).config == config


class TestRefused:
    def test_an_unknown_argument(self):
        with pytest.raises(ConfigError, match=r"argument 'suspicious'.*thresholds"):
            FirewallConfig.load(suspicious=0.1)

    def test_an_unknown_variable(self, monkeypatch):
        monkeypatch.setenv("ALKNET_THREAD", "1")
        with pytest.raises(ConfigError, match=r"ALKNET_THREAD: known are .*ALKNET_THREADS"):
            FirewallConfig.load()

    @pytest.mark.parametrize(
        "text",
        [
            "thread = 1",
            "suspicious = 0.1",
            "[thresholds]\nsuspicous = 0.1",
            "thresholds = 0.1",
            "[limits]\nmax_tokens = 1",
        ],
    )
    def test_an_unknown_key(self, file, text):
        path = file(text)
        with pytest.raises(ConfigError, match=path.name):
            FirewallConfig.load()

    @pytest.mark.parametrize(
        "text",
        ["threads = ", "\x00", "[thresholds", pytest.param("threads = " + 5000 * "9", id="digits")],
    )
    def test_a_file_that_is_not_toml(self, file, text):
        path = file(text)
        with pytest.raises(ConfigError, match=path.name):
            FirewallConfig.load()

    def test_a_named_file_that_does_not_exist(self, monkeypatch, tmp_path):
        monkeypatch.setenv("ALKNET_CONFIG", str(tmp_path / "none.toml"))
        with pytest.raises(ConfigError, match=r"none\.toml, which does not exist"):
            FirewallConfig.load()

    @pytest.mark.parametrize(
        ("text", "value"), [("1", True), ("TRUE", True), ("0", False), ("false", False)]
    )
    def test_a_variable_that_is_true_or_false(self, monkeypatch, text, value):
        monkeypatch.setenv("ALKNET_EARLY_EXIT", text)
        assert FirewallConfig.load().early_exit is value
        assert FirewallConfig.load(early_exit=not value).early_exit is not value

    def test_a_variable_that_is_neither(self, monkeypatch):
        monkeypatch.setenv("ALKNET_EARLY_EXIT", "maybe")
        with pytest.raises(ConfigError, match="'maybe', which is not true or false"):
            FirewallConfig.load()

    @pytest.mark.parametrize("variable", ["THREADS", "MAX_TOKENS", "SUSPICIOUS", "DANGEROUS"])
    def test_a_variable_that_is_no_number(self, monkeypatch, variable):
        monkeypatch.setenv(f"ALKNET_{variable}", "many")
        with pytest.raises(ConfigError, match=f"ALKNET_{variable} is 'many'"):
            FirewallConfig.load()

    @pytest.mark.parametrize(
        "values",
        [
            {"thresholds": Thresholds(0.7, 0.3)},
            {"thresholds": Thresholds(0.0, 0.3)},
            {"thresholds": Thresholds(0.3, 1.1)},
            {"thresholds": Thresholds(float("nan"), 0.3)},
            {"thresholds": Thresholds("low", 0.3)},
            {"thresholds": (0.3, 0.7)},
            {"max_tokens": 0},
            {"max_tokens": 1.5},
            {"max_tokens": 2**31},
            {"threads": -1},
            {"threads": 1025},
            {"threads": True},
            {"early_exit": 1},
            {"engine": "torch"},
            {"engine": ["native"]},
            {"on_error": "ignore"},
            {"detector": None},
            {"detector": 5},
            {"codebook_path": 5},
            {"isa": 5},
        ],
    )
    def test_a_value_out_of_range_or_of_another_type(self, values):
        with pytest.raises(ConfigError, match=next(iter(values))):
            FirewallConfig(**values)

    @pytest.mark.parametrize("text", ["detector = 5", "threads = 0.5", "max_tokens = true"])
    def test_a_value_of_another_type_in_the_file(self, file, text):
        file(text)
        with pytest.raises(ConfigError):
            FirewallConfig.load()

    @pytest.mark.parametrize("text", ['suspicious = "low"', "suspicious = 0.9\ndangerous = 0.1"])
    def test_thresholds_in_the_file(self, file, text):
        file(f"[thresholds]\n{text}\n")
        with pytest.raises(ConfigError, match="thresholds"):
            FirewallConfig.load()

    def test_a_configuration_and_an_option_besides(self, tiny_folder):
        config = FirewallConfig(detector=str(tiny_folder))
        with pytest.raises(ConfigError, match="threads belongs into config"):
            Firewall(config=config, threads=1)

    @pytest.mark.parametrize("isa", ["sse2", "AVX9", ""])
    def test_an_unknown_instruction_set(self, tiny_folder, isa):
        with pytest.raises(ConfigError):
            Firewall(config=FirewallConfig(detector=str(tiny_folder), isa=isa))


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FirewallConfig().threads = 3
