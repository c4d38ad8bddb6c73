"""Harmless machine text of many lines: keys, headers, traces, notations, tables, puzzles.

Each function writes one such text with the given dice. All of it looks like the real thing and
belongs to nobody.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

from .dice import Dice

__all__ = ["RECORDS"]

_HEX = "0123456789abcdef"
_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = _UPPER + _UPPER.lower()
_DIGITS = "0123456789"
_MORSE_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- "
    "-..- -.-- --.."
)
_MORSE = dict(zip(_UPPER.lower(), _MORSE_CODES.split(), strict=True))
# With some that attackers like as well.
_WORD_LINES = """
anchor apple arrow autumn barrel basket beacon birch blanket bottle bridge butter cabin candle
canvas carpet castle cellar chalk cherry cinder circle clover cobalt copper cotton cradle dagger
daisy desert dollar donkey dragon ember engine fabric falcon feather fennel finger forest fossil
garden ginger glacier goblet granite hammer harbor hazel helmet hollow ignore island ivory jacket
jungle kettle ladder lantern lemon linen lizard magnet maple marble meadow mirror needle nickel
novel oyster paddle pepper pewter pillow planet pocket prompt quartz rabbit raven ribbon saddle
salmon secret shadow silver spider sponge system tablet temple thunder timber tunnel turnip valley
velvet violin walnut willow window winter wizard zipper
"""
_WORDS = _WORD_LINES.split()
_PACKAGES = ("left-pad", "lodash", "serde", "requests", "numpy", "tokio", "rich", "vite", "zod")
_MODULES = ("app.views", "core.parser", "shop.cart", "io.reader", "jobs.mailer", "net.pool")
_ERRORS = (
    "KeyError: 'amount'",
    "ValueError: invalid literal for int() with base 10: ''",
    "TimeoutError: connection pool exhausted",
    "IndexError: list index out of range",
    "ZeroDivisionError: division by zero",
)
_EXCEPTIONS = (
    "java.lang.NullPointerException",
    "java.lang.IllegalStateException: already closed",
    "java.util.concurrent.TimeoutException",
    "java.io.FileNotFoundException: settings.xml",
)


def _run(alphabet: str, dice: Dice, count: int) -> str:
    return "".join(dice.pick(alphabet) for _ in range(count))


def _word(dice: Dice) -> str:
    return dice.pick(_WORDS)


def _digits(dice: Dice, count: int) -> str:
    return _run(_DIGITS, dice, count)


def _bytes(dice: Dice, count: int) -> bytes:
    return bytes(dice.between(0, 255) for _ in range(count))


def _lines(write: Callable[[Dice], str], dice: Dice, low: int, high: int) -> str:
    return "\n".join(write(dice) for _ in range(dice.between(low, high)))


def _folded(data: bytes, width: int) -> str:
    text = base64.b64encode(data).decode()
    return "\n".join(text[start : start + width] for start in range(0, len(text), width))


def _clock(dice: Dice) -> str:
    return f"{dice.between(0, 23):02}:{dice.between(0, 59):02}:{dice.between(0, 59):02}"


def _day(dice: Dice) -> str:
    return f"20{dice.between(15, 27)}-{dice.between(1, 12):02}-{dice.between(1, 28):02}"


def _jwt(dice: Dice) -> str:
    header = {"alg": dice.pick(["HS256", "RS256", "ES256"]), "typ": "JWT"}
    claims = {"sub": str(dice.between(1_000, 99_999)), "iat": dice.between(10**9, 2 * 10**9)}
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), _bytes(dice, 32)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def _pem(dice: Dice) -> str:
    kind = dice.pick(["CERTIFICATE", "PUBLIC KEY", "PGP SIGNATURE", "CERTIFICATE REQUEST"])
    body = _folded(_bytes(dice, dice.between(120, 500)), 64)
    return f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----"


def _ssh_key(dice: Dice) -> str:
    body = base64.b64encode(_bytes(dice, 48)).decode()
    return f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA{body} {_word(dice)}@{_word(dice)}"


def _attachment(dice: Dice) -> str:
    name = _word(dice)
    kind, ending = dice.pick(
        [("image/jpeg", "jpg"), ("application/pdf", "pdf"), ("text/csv", "csv")]
    )
    return (
        f"--=_part_{_digits(dice, 9)}\n"
        f'Content-Type: {kind}; name="{name}.{ending}"\n'
        f'Content-Disposition: attachment; filename="{name}.{ending}"\n'
        "Content-Transfer-Encoding: base64\n\n" + _folded(_bytes(dice, dice.between(90, 400)), 76)
    )


def _mail_header(dice: Dice) -> str:
    host, other = _word(dice), _word(dice)
    return (
        f"Return-Path: <bounce-{_run(_HEX, dice, 12)}@{host}.example>\n"
        f"Received: from mx{dice.between(1, 9)}.{host}.example (10.{dice.between(0, 255)}.4.7)\n"
        f"\tby {other}.example with ESMTPS id {_run(_LETTERS + _DIGITS, dice, 14)};\n"
        f"\t{_day(dice)} {_clock(dice)} +0000\n"
        f"Message-ID: <{_run(_HEX, dice, 24)}@{host}.example>\n"
        f"DKIM-Signature: v=1; a=rsa-sha256; d={host}.example; s=s1;\n"
        f"\tbh={base64.b64encode(_bytes(dice, 32)).decode()};\n"
        f"\tb={base64.b64encode(_bytes(dice, 64)).decode()}\n"
        "MIME-Version: 1.0"
    )


def _hex_dump(dice: Dice) -> str:
    lines = []
    for number in range(dice.between(3, 16)):
        data = _bytes(dice, 16)
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
        pairs = " ".join(f"{byte:02x}" for byte in data)
        lines.append(f"{number * 16:08x}  {pairs}  |{shown}|")
    return "\n".join(lines)


def _trace(dice: Dice) -> str:
    frames = "\n".join(
        f'  File "/srv/{dice.pick(_MODULES).replace(".", "/")}.py", line {dice.between(3, 900)},'
        f" in {_word(dice)}_{_word(dice)}\n    {_word(dice)}({_word(dice)})"
        for _ in range(dice.between(2, 9))
    )
    return f"Traceback (most recent call last):\n{frames}\n{dice.pick(_ERRORS)}"


def _java_trace(dice: Dice) -> str:
    frames = "\n".join(
        f"\tat com.example.{_word(dice)}.{_word(dice).title()}Service."
        f"{_word(dice)}({_word(dice).title()}.java:{dice.between(10, 900)})"
        for _ in range(dice.between(3, 14))
    )
    return f'Exception in thread "main" {dice.pick(_EXCEPTIONS)}\n{frames}'


def _core_dump(dice: Dice) -> str:
    name = _word(dice)
    frames = "\n".join(
        f"#{number}  0x{_run(_HEX, dice, 16)} in {_word(dice)}_{_word(dice)} ()"
        f" from /usr/lib/lib{_word(dice)}.so.{dice.between(1, 9)}"
        for number in range(dice.between(3, 9))
    )
    return f"Core was generated by `{name} --daemon'.\nSIGSEGV, Segmentation fault.\n{frames}"


def _registers(dice: Dice) -> str:
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "rip")
    return "\n".join(f"{name:<4} 0x{_run(_HEX, dice, 16)}" for name in names)


def _assembly(dice: Dice) -> str:
    registers = ("rax", "rbx", "ecx", "edi", "xmm0", "r12")

    def line(dice: Dice) -> str:
        code = dice.pick(["mov", "add", "sub", "xor", "cmp", "lea", "imul", "test"])
        return f"\t{code}\t{dice.pick(registers)}, {dice.pick(registers)}"

    body = _lines(line, dice, 4, 16)
    return f"{_word(dice)}:\n\tpush\trbp\n{body}\n\tjne\t.L{dice.between(1, 9)}\n\tret"


def _syslog(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        event = dice.pick(
            [
                f"Accepted publickey for {_word(dice)} port {dice.between(1024, 65535)} ssh2",
                f"Started Session {dice.between(1, 999)} of user root.",
                f"eth0: link up, {dice.pick(['100', '1000'])} Mbps, full duplex",
                f"Killed process {dice.between(100, 9999)} ({_word(dice)}), out of memory",
                f"DHCPACK of 192.168.{dice.between(0, 9)}.{dice.between(2, 250)}",
                f"(root) CMD (/usr/local/bin/{_word(dice)} --quiet)",
            ]
        )
        source = dice.pick(["sshd", "systemd", "kernel", "CRON", "dhclient", "oom"])
        host = dice.pick(["web1", "nas", "pi"])
        stamp = f"Nov {dice.between(1, 28):2} {_clock(dice)}"
        return f"{stamp} {host} {source}[{dice.between(1, 9999)}]: {event}"

    return _lines(line, dice, 2, 14)


def _telemetry(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        return json.dumps(
            {
                "ts": dice.between(10**9, 2 * 10**9),
                "dev": _run(_HEX, dice, 8),
                "temp": dice.between(-200, 900) / 10,
                "volt": dice.between(280, 420) / 100,
                "ok": dice.chance(0.9),
                "seq": dice.between(1, 99_999),
            }
        )

    return _lines(line, dice, 2, 12)


def _metrics(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        name = f"{_word(dice)}_{dice.pick(['total', 'seconds', 'bytes', 'ratio'])}"
        code = dice.pick(["200", "404", "500"])
        return f'{name}{{host="{_word(dice)}",code="{code}"}} {dice.between(0, 10**6)}'

    return _lines(line, dice, 3, 14)


def _lock_file(dice: Dice) -> str:
    def entry(dice: Dice) -> str:
        version = ".".join(str(dice.between(0, 30)) for _ in range(3))
        name = dice.pick(_PACKAGES)
        digest = base64.b64encode(_bytes(dice, 48)).decode()
        return dice.pick(
            [
                f'"{name}@^{version}":\n  version "{version}"\n  integrity sha512-{digest}',
                f'[[package]]\nname = "{name}"\nversion = "{version}"\n'
                f'checksum = "{_run(_HEX, dice, 64)}"',
                f"{name}=={version} \\\n    --hash=sha256:{_run(_HEX, dice, 64)}",
            ]
        )

    return "\n\n".join(entry(dice) for _ in range(dice.between(1, 6)))


def _diff(dice: Dice) -> str:
    name = f"src/{_word(dice)}.{dice.pick(['py', 'rs', 'ts', 'c'])}"

    def line(dice: Dice) -> str:
        sign = dice.pick([" ", " ", "-", "+"])
        return f"{sign}    {_word(dice)} = {_word(dice)}({dice.between(0, 99)})"

    start = dice.between(1, 400)
    return (
        f"diff --git a/{name} b/{name}\nindex {_run(_HEX, dice, 7)}..{_run(_HEX, dice, 7)} 100644\n"
        f"--- a/{name}\n+++ b/{name}\n@@ -{start},7 +{start},9 @@\n{_lines(line, dice, 4, 12)}"
    )


def _minified(dice: Dice) -> str:
    def statement(dice: Dice) -> str:
        a, b, c = (dice.pick(_LETTERS) for _ in range(3))
        return dice.pick(
            [
                f"var {a}={b}[{dice.between(0, 9)}]||{{}};",
                f"function {a}({b},{c}){{return {b}?{c}.{_word(dice)}({b}):null}}",
                f"!function({a}){{{a}.{_word(dice)}=!0}}({b});",
                f'{a}.addEventListener("click",{b}=>{{{c}({b}.target)}});',
                f"for(let {a}=0;{a}<{b}.length;{a}++){c}+={b}[{a}];",
            ]
        )

    return "".join(statement(dice) for _ in range(dice.between(4, 25)))


def _stylesheet(dice: Dice) -> str:
    def rule(dice: Dice) -> str:
        return (
            f".{_word(dice)}-{_run(_HEX, dice, 5)}{{margin:{dice.between(0, 40)}px;"
            f"color:#{_run(_HEX, dice, 6)};display:{dice.pick(['flex', 'grid', 'none', 'block'])}"
            f"{dice.pick(['!important', '', ''])}}}"
        )

    return "".join(rule(dice) for _ in range(dice.between(3, 20)))


def _svg_path(dice: Dice) -> str:
    steps = " ".join(
        f"{dice.pick('MLCQTlcq')}{dice.between(0, 9999) / 10},{dice.between(0, 999)}"
        for _ in range(dice.between(6, 40))
    )
    return f'<path d="{steps} Z" fill="#{_run(_HEX, dice, 6)}"/>'


def _gcode(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        x, y = (f"{dice.between(0, 200)}.{dice.between(0, 999):03}" for _ in range(2))
        last = dice.pick(["F1200", f"E0.{dice.between(10, 99)}", "Z0.2"])
        return f"G{dice.pick('01')} X{x} Y{y} {last}"

    return "G28 ; home\nM104 S210\nG90\n" + _lines(line, dice, 4, 20) + "\nM84"


def _dna(dice: Dice) -> str:
    if dice.chance(0.3):
        return f">sp|P{_digits(dice, 5)}\n" + _run(
            "ACDEFGHIKLMNPQRSTVWY", dice, dice.between(60, 300)
        )
    header = f">seq_{dice.between(1, 9999)} {_word(dice)}\n" if dice.chance(0.5) else ""
    return header + "\n".join(_run("ACGT", dice, 60) for _ in range(dice.between(1, 8)))


def _chess(dice: Dice) -> str:
    def move(dice: Dice) -> str:
        square = f"{dice.pick('abcdefgh')}{dice.between(1, 8)}"
        return dice.pick(["", "", "N", "B", "R", "Q", "K"]) + dice.pick(["", "", "x"]) + square

    moves = " ".join(
        f"{number}. {move(dice)} {move(dice)}{dice.pick(['', '', '+', '!', '?!'])}"
        for number in range(1, dice.between(6, 40))
    )
    result = dice.pick(["1-0", "0-1", "1/2-1/2"])
    return f'[Event "Club evening"]\n[Date "{_day(dice)}"]\n[Result "{result}"]\n\n{moves} {result}'


def _tune(dice: Dice) -> str:
    bars = " | ".join(
        " ".join(
            _run("ABCDEFGabcdefgz", dice, 1) + dice.pick(["", "2", "/2", "3"]) for _ in range(4)
        )
        for _ in range(dice.between(4, 16))
    )
    key = dice.pick(["G", "D", "Am", "Edor", "C"])
    head = f"X:{dice.between(1, 300)}\nT:The {_word(dice).title()}"
    return f"{head}\nM:6/8\nL:1/8\nK:{key}\n|: {bars} :|"


def _midi(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        event = dice.pick(["Note_on_c", "Note_off_c", "Control_c"])
        channel, time = dice.between(1, 16), dice.between(0, 90_000)
        return f"{channel}, {time}, {event}, 0, {dice.between(21, 108)}, {dice.between(0, 127)}"

    return _lines(line, dice, 4, 20)


def _formula(dice: Dice) -> str:
    def term(dice: Dice) -> str:
        a, b = dice.pick("xyznkt"), dice.between(2, 9)
        return dice.pick(
            [
                rf"\frac{{{a}^{{{b}}}}}{{{b}!}}",
                rf"\sum_{{k=0}}^{{\infty}} {a}_k",
                rf"\int_0^{{{b}}} {a} \, d{a}",
                rf"\sqrt{{{a}+{b}}}",
                rf"\lambda_{{{b}}} {a}",
            ]
        )

    body = dice.pick([" + ", " - ", " = "]).join(term(dice) for _ in range(dice.between(2, 7)))
    return f"$${body}$$"


def _regex(dice: Dice) -> str:
    parts = (
        r"^\s*",
        r"(?:\d{1,3}\.){3}\d{1,3}",
        r"[A-Z]{2}\d+",
        r"(?P<key>\w+)=(.*?)",
        r"\b0x[0-9a-f]+\b",
    )
    more = (r"(?<!\\)\"", r"[^,;]+", r"\.(?:jpe?g|png)$", r"(\w)\1+", r"(?i:ignore)?")
    return "".join(dice.pick(parts + more) for _ in range(dice.between(1, 6)))


def _license_keys(dice: Dice) -> str:
    def key(dice: Dice) -> str:
        return "-".join(_run(_UPPER + _DIGITS, dice, 5) for _ in range(5))

    return _lines(key, dice, 1, 8)


def _accounts(dice: Dice) -> str:
    def account(dice: Dice) -> str:
        digits = _digits(dice, 18)
        blocks = " ".join(digits[start : start + 4] for start in range(0, 18, 4))
        return f"{dice.pick(['DE', 'FR', 'NL', 'PT'])}{dice.between(10, 99)} {blocks}"

    return _lines(account, dice, 1, 6)


def _barcodes(dice: Dice) -> str:
    def row(dice: Dice) -> str:
        return f"{_digits(dice, 13)}\t{_word(dice)}\t{dice.between(1, 99)}"

    return _lines(row, dice, 1, 12)


def _phones(dice: Dice) -> str:
    def row(dice: Dice) -> str:
        number = f"{_digits(dice, 3)} {_digits(dice, 4)}"
        return f"{_word(dice).title():<12}+{dice.between(1, 99)} 555 {number}"

    return _lines(row, dice, 2, 14)


def _table(dice: Dice) -> str:
    columns = dice.between(3, 9)
    gap = dice.pick(["\t", "  ", " | ", ","])

    def row(dice: Dice) -> str:
        return gap.join(f"{dice.between(-999, 9999) / 100:8.2f}" for _ in range(columns))

    return gap.join(_word(dice) for _ in range(columns)) + "\n" + _lines(row, dice, 3, 18)


def _drawing(dice: Dice) -> str:
    width = dice.between(12, 40)
    shade = dice.pick(["  .:-=+*#%@", "   /\\|_-()", "  ░▒▓█", " o*."])
    return "\n".join(_run(shade, dice, width).rstrip() or "." for _ in range(dice.between(4, 12)))


def _morse(dice: Dice) -> str:
    words = (_word(dice) for _ in range(dice.between(1, 8)))
    return " / ".join(" ".join(_MORSE[letter] for letter in word) for word in words)


def _letter_grid(dice: Dice) -> str:
    size = dice.between(6, 14)
    alphabet = _UPPER + ("#" * 8 if dice.chance(0.5) else "")
    return "\n".join(" ".join(_run(alphabet, dice, size)) for _ in range(size))


def _sudoku(dice: Dice) -> str:
    if dice.chance(0.4):
        return _run("....123456789", dice, 81)
    rows = [" ".join(_run("......123456789", dice, 9)) for _ in range(9)]
    return "\n".join(rows)


def _word_list(dice: Dice) -> str:
    return dice.pick([" ", "\n", ", ", "-"]).join(_word(dice) for _ in range(dice.between(3, 40)))


def _addresses(dice: Dice) -> str:
    names = ("q", "page", "utm_source", "sid", "lang", "cb", "ref")

    def line(dice: Dice) -> str:
        query = "&".join(
            f"{dice.pick(names)}={_run(_HEX, dice, dice.between(1, 20))}"
            for _ in range(dice.between(1, 6))
        )
        return f"https://{_word(dice)}.example.com/{_word(dice)}/{_word(dice)}?{query}"

    return _lines(line, dice, 1, 10)


def _listing(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        mode = dice.pick(["-rw-r--r--", "drwxr-xr-x", "-rwx------", "lrwxrwxrwx"])
        name = f"{_word(dice)}.{dice.pick(['txt', 'o', 'sh', 'log'])}"
        size = dice.between(10, 10**7)
        return f"{mode} {dice.between(1, 9)} root root {size:>8} {_day(dice)} {name}"

    return f"total {dice.between(8, 900)}\n" + _lines(line, dice, 2, 14)


def _positions(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        north, east = dice.between(-90, 89), dice.between(-180, 179)
        return f"{north}.{_digits(dice, 6)}, {east}.{_digits(dice, 6)}"

    return _lines(line, dice, 1, 14)


def _nmea(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        clock = _clock(dice).replace(":", "")
        north = f"{_digits(dice, 4)}.{_digits(dice, 4)},N"
        east = f"0{_digits(dice, 4)}.{_digits(dice, 4)},E"
        height, check = dice.between(0, 900), _run(_HEX, dice, 2).upper()
        return f"$GPGGA,{clock}.00,{north},{east},1,08,0.9,{height}.4,M,,*{check}"

    return _lines(line, dice, 1, 8)


def _molecule(dice: Dice) -> str:
    pieces = (
        "CC",
        "C(=O)O",
        "c1ccccc1",
        "N",
        "O",
        "C(N)",
        "Cl",
        "[Na+]",
        "C#N",
        "S(=O)(=O)",
        "C1CCC1",
    )
    return "".join(dice.pick(pieces) for _ in range(dice.between(3, 14)))


def _cron_table(dice: Dice) -> str:
    def line(dice: Dice) -> str:
        fields = " ".join(dice.pick(["*", "*/5", "0", str(dice.between(1, 12))]) for _ in range(5))
        command = f"/opt/{_word(dice)}/{_word(dice)}.sh"
        return f"{fields} {command} >> /var/log/{_word(dice)}.log"

    return _lines(line, dice, 1, 8)


def _escaped(dice: Dice) -> str:
    words = " ".join(_word(dice) for _ in range(dice.between(2, 8)))
    return dice.pick(
        [
            "".join(f"%{byte:02X}" for byte in words.encode()),
            "".join(f"\\x{byte:02x}" for byte in words.encode()),
            "".join(f"&#{ord(letter)};" for letter in words),
            " ".join(f"{byte:08b}" for byte in words.encode()),
        ]
    )


def _query_plan(dice: Dice) -> str:
    def step(depth: int) -> str:
        kind = dice.pick(["Seq Scan", "Index Scan", "Hash Join", "Sort", "Nested Loop"])
        cost = f"cost={dice.between(0, 99)}.50..{dice.between(100, 9999)}.00"
        return f"{'  ' * depth}->  {kind} on {_word(dice)}  ({cost} rows={dice.between(1, 10**6)})"

    return "\n".join(step(depth) for depth in range(dice.between(2, 6)))


def _whois(dice: Dice) -> str:
    name = _word(dice)
    records = (
        f"{name}.example.\t3600\tIN\tA\t192.0.2.{dice.between(1, 250)}",
        f"{name}.example.\t3600\tIN\tMX\t10 mail.{name}.example.",
        f'{name}.example.\t300\tIN\tTXT\t"v=spf1 include:_spf.{name}.example -all"',
        f'_acme-challenge.{name}.example.\t60\tIN\tTXT\t"{_run(_LETTERS + _DIGITS, dice, 43)}"',
        f"www.{name}.example.\t3600\tIN\tCNAME\t{name}.example.",
    )
    return "\n".join(dice.sample(records, dice.between(1, 5)))


#: Writers of machine text, each equally likely.
RECORDS: tuple[Callable[[Dice], str], ...] = (
    _accounts,
    _addresses,
    _assembly,
    _attachment,
    _barcodes,
    _chess,
    _core_dump,
    _cron_table,
    _diff,
    _dna,
    _drawing,
    _escaped,
    _formula,
    _gcode,
    _hex_dump,
    _java_trace,
    _jwt,
    _letter_grid,
    _license_keys,
    _listing,
    _lock_file,
    _mail_header,
    _metrics,
    _midi,
    _minified,
    _molecule,
    _morse,
    _nmea,
    _pem,
    _phones,
    _positions,
    _query_plan,
    _regex,
    _registers,
    _ssh_key,
    _stylesheet,
    _sudoku,
    _svg_path,
    _syslog,
    _table,
    _telemetry,
    _trace,
    _tune,
    _whois,
    _word_list,
)
