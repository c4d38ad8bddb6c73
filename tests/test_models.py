"""Engines from elsewhere: anything that hands out activations."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alknet_firewall import (
    AlarmLevel,
    CodebookError,
    ConfigError,
    DetectorModel,
    Firewall,
    InferenceError,
    ModelLoadError,
    OnnxModel,
    TorchModel,
    _core,
)
from safetensors.numpy import load_file, save_file
from tiny_detector import (
    ATTACK,
    BENIGN,
    GOLDEN,
    HIDDEN_SIZE,
    N_BLOCKS,
    ORDER,
    SITES,
    write_codebook,
)

CLEAR, _, DANGEROUS = AlarmLevel
VOCABULARY = json.loads((GOLDEN / "tiny-tokenizer.json").read_text())["model"]["vocab"]


def ids_of(text: str) -> list[int]:
    """Tokens of printable ASCII without the few longer ones."""
    return [VOCABULARY[char] for char in text]


class Embedding:
    """A model of one table: each token has its row, whatever stands around it."""

    def __init__(self):
        self.sites = list(SITES)
        self.hidden_size = HIDDEN_SIZE
        self.max_position_embeddings = 128
        self.bos_token_id: int | None = 0
        shape = (len(VOCABULARY), len(SITES), HIDDEN_SIZE)
        self.table = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
        self.calls: list[list[int]] = []

    def activations(self, input_ids):
        self.calls.append(list(input_ids))
        return self.table[input_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tokenizer and codebook of `Embedding`, and nothing else."""
    folder = tmp_path_factory.mktemp("embedding")
    shutil.copyfile(GOLDEN / "tiny-tokenizer.json", folder / "tokenizer.json")
    table = Embedding().table.reshape(len(VOCABULARY), -1)
    rng = np.random.default_rng(6)
    benign = table[rng.integers(3, len(VOCABULARY), (400, 8))].mean(axis=1)
    repeated = [np.tile(table[ids_of(text)].mean(axis=0), (8, 1)) for text in (ATTACK, ORDER)]
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    fingerprint = {"tokenizer_sha256": sha256, "weights_sha256": "-", "config_sha256": "-"}
    write_codebook(folder / "codebook.safetensors", benign, *repeated, fingerprint)
    return folder


class TestProtocol:
    def test_a_model_of_ones_own_screens(self, folder):
        firewall = Firewall(folder, model=Embedding())
        assert firewall.engine == "Embedding"
        assert firewall.screen(BENIGN[0]).level is CLEAR
        assert firewall.screen(f"{BENIGN[0]} {ATTACK}").level is DANGEROUS
        assert firewall.screen(ORDER, origin="user").level is CLEAR
        assert firewall.screen(ORDER, origin="document").level is DANGEROUS

    def test_it_reads_the_tokens_after_its_first(self, folder):
        model = Embedding()
        firewall = Firewall(folder, model=model)
        assert model.calls == [[0]]
        firewall.screen("AB!")
        assert model.calls[1:] == [[0, *ids_of("AB!")]]

    def test_a_model_without_a_first_token(self, folder):
        model = Embedding()
        model.bos_token_id = None
        Firewall(folder, model=model).screen("AB!")
        assert model.calls == [ids_of("AB!")]

    def test_batches_streams_and_activations(self, folder):
        firewall = Firewall(folder, model=Embedding())
        texts = [*BENIGN, ATTACK, BENIGN[0] * 10 + ATTACK]
        alone = [firewall.screen(text) for text in texts]
        assert firewall.screen_batch(texts) == alone
        with firewall.stream() as stream:
            for char in texts[-1]:
                stream.feed(char)
        assert stream.alarm == alone[-1]
        array = firewall.activations("AB!")
        np.testing.assert_array_equal(array, Embedding().table[ids_of("AB!")])

    def test_it_is_a_detector_model(self):
        assert isinstance(Embedding(), DetectorModel)
        assert not isinstance(object(), DetectorModel)

    @pytest.mark.parametrize("model", [object(), "model", Embedding])
    def test_what_is_no_model_is_refused(self, folder, model):
        with pytest.raises(ConfigError, match="DetectorModel"):
            Firewall(folder, model=model)


class TestReadouts:
    """A codebook that asks for a token every ten others."""

    @staticmethod
    def write(folder, out, entry, **more) -> Path:
        codebook = folder / "codebook.safetensors"
        tensors, metadata = load_file(codebook), _core.inspect_codebook(str(codebook))
        metadata.pop("n_components")
        weights = tensors["direction_weights"]
        tensors["direction_weights"] = np.concatenate([weights, weights[:1]])
        metadata["closing"] = json.dumps(entry)
        closed = Path(shutil.copytree(folder, out))
        save_file(tensors | more, closed / "codebook.safetensors", metadata=metadata)
        return closed

    @pytest.fixture
    def closed(self, folder, tmp_path) -> Path:
        return self.write(folder, tmp_path / "closed", {"token": 5, "every": 10})

    @pytest.fixture
    def learned(self, folder, tmp_path) -> Path:
        """One whose readouts were learned: all ones."""
        vectors = np.ones((N_BLOCKS, HIDDEN_SIZE), dtype=np.float32)
        return self.write(folder, tmp_path / "learned", {"every": 10}, closing=vectors)

    def test_they_are_asked_for_where_they_stand(self, closed, folder):
        class Beside(Embedding):
            def activations(self, input_ids, readouts=()):
                self.readouts = list(readouts)
                return super().activations([*input_ids, *(token for _, token in readouts)])

        text, model = (ATTACK * 5)[:25], Beside()
        ids = [0, *ids_of(text)]
        assert len(ids) == 26
        alarm = Firewall(closed, model=model).screen(text)
        assert model.readouts == [(11, 5), (21, 5), (26, 5)]
        assert model.calls[-1] == [*ids, 5, 5, 5]
        assert alarm.p_value != Firewall(folder, model=model).screen(text).p_value
        assert model.readouts == []

    def test_what_was_learned_is_handed_to_models_that_read_it(self, learned):
        class Learner(Embedding):
            reads_learned = True

            def activations(self, input_ids, readouts=()):
                self.readouts = list(readouts)
                learned = [self.table[:1] for _ in readouts]
                return np.concatenate([super().activations(input_ids), *learned])

        model = Learner()
        Firewall(learned, model=model).screen((ATTACK * 5)[:25])
        assert [after for after, _ in model.readouts] == [11, 21, 26]
        for _, probe in model.readouts:
            np.testing.assert_array_equal(probe, np.ones((N_BLOCKS, HIDDEN_SIZE), np.float32))

    def test_models_that_read_tokens_only_are_refused_what_was_learned(self, learned):
        with pytest.raises(CodebookError, match="Embedding reads tokens only"):
            Firewall(learned, model=Embedding())

    def test_a_model_that_reads_none_gives_no_verdict(self, closed):
        with pytest.raises(InferenceError, match=r"TypeError.*n_readouts"):
            Firewall(closed, model=Embedding()).screen(BENIGN[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sites", list(reversed(SITES))),
            ("sites", list(SITES[:1])),
            ("hidden_size", HIDDEN_SIZE // 2),
            ("max_position_embeddings", 64),
        ],
    )
    def test_a_model_that_does_not_fit_the_codebook(self, folder, name, value):
        class Other(Embedding):
            def activations(self, input_ids):
                return np.zeros((len(input_ids), len(self.sites), self.hidden_size), np.float32)

        model = Other()
        setattr(model, name, value)
        with pytest.raises(CodebookError):
            Firewall(folder, model=model)

    def test_a_site_that_is_none(self, folder):
        model = Embedding()
        model.sites = ["output"]
        with pytest.raises(ConfigError, match="site"):
            Firewall(folder, model=model)

    def test_another_tokenizer_than_the_codebooks(self, folder, tmp_path):
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        tokenizer = other / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        with pytest.raises(CodebookError, match=r"tokenizer\.json with sha256"):
            Firewall(other, model=Embedding())

    def test_without_a_model_the_folder_must_be_complete(self, folder):
        with pytest.raises(ModelLoadError, match=r"has no config\.json"):
            Firewall(folder)

    def test_a_missing_tokenizer(self, folder, tmp_path):
        shutil.copyfile(folder / "codebook.safetensors", tmp_path / "codebook.safetensors")
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json: cannot be read"):
            Firewall(tmp_path, model=Embedding())


class TestWrongAnswers:
    """What a model must not get away with: there is no verdict then."""

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda rows: rows.astype(np.float64),
            lambda rows: rows[:-1],
            lambda rows: rows[:, :1],
            lambda rows: rows[..., :-1],
            lambda rows: rows.reshape(len(rows), -1),
            lambda rows: rows.tolist(),
            lambda rows: None,
            lambda rows: rows * np.float32("nan"),
            lambda rows: rows * np.float32("inf"),
        ],
        ids=["float64", "short", "sites", "narrow", "flat", "list", "none", "nan", "inf"],
    )
    def test_it_is_an_error(self, folder, spoil):
        class Spoilt(Embedding):
            def activations(self, input_ids):
                rows = super().activations(input_ids)
                return rows if len(input_ids) == 1 else spoil(rows)

        firewall = Firewall(folder, model=Spoilt())
        with pytest.raises(InferenceError):
            firewall.screen(BENIGN[0])
        blocking = Firewall(folder, model=Spoilt(), on_error="block")
        assert blocking.screen(BENIGN[0]).level is DANGEROUS

    def test_rows_need_not_lie_together(self, folder):
        class Strided(Embedding):
            def activations(self, input_ids):
                return np.asfortranarray(super().activations(input_ids))

        expected = Firewall(folder, model=Embedding()).screen(ATTACK)
        assert Firewall(folder, model=Strided()).screen(ATTACK) == expected

    def test_an_exception_names_its_type_only(self, folder):
        class Failing(Embedding):
            def activations(self, input_ids):
                if len(input_ids) == 1:
                    return super().activations(input_ids)
                raise KeyError("zyxcanaryzyx")

        firewall = Firewall(folder, model=Failing())
        with pytest.raises(InferenceError, match=r"Failing\.activations raised KeyError") as caught:
            firewall.screen("zyxcanaryzyx")
        assert "canary" not in str(caught.value)


class TestOnnx:
    @pytest.fixture
    def graph(self, tmp_path) -> str:
        """`Embedding` as an ONNX graph: one look-up for each site."""
        onnx = pytest.importorskip("onnx")
        from onnx import TensorProto, helper, numpy_helper

        table = Embedding().table
        nodes, tables, outputs = [], [], []
        for s, site in enumerate(SITES):
            rows = numpy_helper.from_array(np.ascontiguousarray(table[:, s]), f"table{s}")
            tables.append(rows)
            nodes.append(helper.make_node("Gather", [rows.name, "input_ids"], [site]))
            shape = [1, "seq_len", HIDDEN_SIZE]
            outputs.append(helper.make_tensor_value_info(site, TensorProto.FLOAT, shape))
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "seq_len"])
        graph = helper.make_graph(nodes, "embedding", [ids], outputs, tables)
        opset = [helper.make_opsetid("", 17)]
        path = str(tmp_path / "embedding.onnx")
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
        return path

    def load(self, graph: str, sites=SITES) -> OnnxModel:
        pytest.importorskip("onnxruntime")
        return OnnxModel(graph, sites, max_position_embeddings=128, bos_token_id=0)

    def test_its_activations(self, graph):
        array = self.load(graph).activations([5, 9, 200])
        np.testing.assert_array_equal(array, Embedding().table[[5, 9, 200]])
        assert array.dtype == np.float32

    def test_it_screens_like_the_same_model_in_numpy(self, graph, folder):
        firewall = Firewall(folder, model=self.load(graph))
        reference = Firewall(folder, model=Embedding())
        assert firewall.engine == "OnnxModel"
        for text in (*BENIGN, ATTACK, ORDER, BENIGN[0] * 5):
            assert firewall.screen(text) == reference.screen(text)

    def test_a_graph_without_a_mask_reads_nothing_beside_a_text(self, graph):
        with pytest.raises(ModelLoadError, match="attention_mask"):
            self.load(graph).activations([5, 9, 200], [(3, 7)])

    def test_a_graph_is_told_what_each_row_sees(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        from onnx import TensorProto, helper

        def value(name, kind, shape):
            return helper.make_tensor_value_info(name, kind, shape)

        inputs = [
            value("input_ids", TensorProto.INT64, [1, "n"]),
            value("position_ids", TensorProto.INT64, [1, "n"]),
            value("attention_mask", TensorProto.FLOAT, [1, 1, "n", "n"]),
        ]
        # What it sees of the mask is handed out as it is, and so are the positions.
        nodes = [
            helper.make_node("Constant", [], ["one"], value_ints=[1]),
            helper.make_node("Squeeze", ["attention_mask", "one"], ["0.resid_post"]),
        ]
        outputs = [value("0.resid_post", TensorProto.FLOAT, [1, "n", 5])]
        graph = helper.make_graph(nodes, "mask", inputs, outputs)
        path = str(tmp_path / "mask.onnx")
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
        seen = self.load(path, ["0.resid_post"]).activations([5, 9, 200], [(1, 7), (3, 7)])[:, 0]
        expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
        np.testing.assert_array_equal(seen == 0, [*expected, [1, 1, 1, 0, 0]])

    def test_an_output_that_is_not_there(self, graph):
        with pytest.raises(ModelLoadError, match=r"no output '7\.resid_post'"):
            self.load(graph, ["7.resid_post"])


class TestTorch:
    @pytest.fixture
    def model(self):
        """The tiny model of the goldens in Transformers."""
        pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        return transformers.LlamaModel.from_pretrained(GOLDEN / "tiny")

    def test_it_has_the_activations_of_the_reference_engine(self, model, tiny_folder):
        sites = ["0.resid_post", "1.resid_post"]
        torch_model = TorchModel(model, sites)
        reader = _core.Reader(str(tiny_folder), sites, engine="candle")
        found = torch_model.activations([0, *ids_of("Tuesday")])[1:]
        np.testing.assert_allclose(found, reader.activations("Tuesday"), rtol=1e-4, atol=1e-4)

    def test_it_reads_beside_a_text_as_the_reference_engine_does(self, model, tiny_folder):
        sites = ["0.resid_post", "1.resid_post"]
        reader = _core.Reader(str(tiny_folder), sites, engine="candle")
        ids = [0, *ids_of("Tuesday")]
        readouts = [(4, 7), (7, 7), (8, 7)]
        found = TorchModel(model, sites).activations(ids, readouts)[1:]
        found /= np.sqrt((found**2).mean(axis=2, keepdims=True) + 1e-6)
        options = {"window": 1, "stride": 1, "max_tokens": 64, "closing": ([7], 3)}
        (expected,) = reader.window_means(["Tuesday"], **options)
        np.testing.assert_allclose(found.reshape(len(found), -1), expected, rtol=1e-4, atol=1e-4)

    def test_it_reads_what_was_learned_as_the_reference_engine_does(self, model, tiny_folder):
        sites = ["0.resid_post", "1.resid_post"]
        reader = _core.Reader(str(tiny_folder), sites, engine="candle")
        ids = [0, *ids_of("Tuesday")]
        shape = (2, model.config.hidden_size)
        vectors = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        readouts = [(4, vectors), (7, vectors), (8, vectors)]
        torch_model = TorchModel(model, sites)
        alone, found = torch_model.activations(ids), torch_model.activations(ids, readouts)
        np.testing.assert_allclose(found[: len(ids)], alone, rtol=1e-4, atol=1e-4)
        found = found[1:] / np.sqrt((found[1:] ** 2).mean(axis=2, keepdims=True) + 1e-6)
        options = {"window": 1, "stride": 1, "max_tokens": 64, "closing": ([vectors], 3)}
        (expected,) = reader.window_means(["Tuesday"], **options)
        np.testing.assert_allclose(found.reshape(len(found), -1), expected, rtol=1e-4, atol=1e-4)

    def test_what_was_learned_stays_in_the_call_that_reads_it(self, model):
        ids, vectors = [0, *ids_of("Tuesday")], np.ones((2, HIDDEN_SIZE), dtype=np.float32)
        one, other = TorchModel(model, ["0.resid_post"]), TorchModel(model, ["0.resid_post"])
        assert vectors.shape[1] == model.config.hidden_size
        expected = other.activations(ids)
        one.activations(ids, [(len(ids) - 1, vectors)])
        with pytest.raises(IndexError):
            one.activations([10**6], [(0, vectors)])
        np.testing.assert_array_equal(other.activations(ids), expected)

    def test_the_last_layer_is_refused(self, model):
        with pytest.raises(ModelLoadError, match="final-normed"):
            TorchModel(model, ["3.resid_post"])

    def test_other_sites_are_refused(self, model):
        with pytest.raises(ModelLoadError, match=r"LAYER\.resid_post only"):
            TorchModel(model, ["1.mlp_out"])


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("torch", "TorchModel(None, [])", "pip install 'alknet-firewall[torch]'"),
        (
            "onnxruntime",
            "OnnxModel('x', [], max_position_embeddings=1, bos_token_id=0)",
            "pip install 'alknet-firewall[onnx]'",
        ),
    ],
)
def test_a_missing_extra_says_what_to_install(module, call, message):
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from alknet_firewall import OnnxModel, TorchModel\n"
        f"try:\n    {call}\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_the_package_imports_no_heavy_module():
    heavy = ["torch", "onnxruntime", "numpy", "scipy", "sklearn", "huggingface_hub", "click"]
    code = f"import sys, alknet_firewall; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
