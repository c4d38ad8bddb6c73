"""Disguises: change how a text is written so that a person or a model can still read it.

Each transformation is a function from text to text, deterministic for the same text, found by name
in `TRANSFORMS`. None takes part in calibration: they measure how much gets past a detector, and
make the test data in ``tests/attacks``. To disguise the lines of standard input::

    python -m alknet_firewall.evaluation.transforms zalgo
"""

from __future__ import annotations

import base64
import codecs
import random
import sys
import zlib
from collections.abc import Callable

__all__ = ["TRANSFORMS"]

# What a reader sees where the whole text is hidden in invisible characters.
COVER = "Thanks, see you on Monday! \N{SLIGHTLY SMILING FACE}"

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
BIDI = "\u200e\u200f\u202a\u202d\u202e\u2066\u2068"
LEET = str.maketrans("aeiostAEIOST", "431057431057")
HOMOGLYPHS = str.maketrans(
    {
        **dict(
            zip("aceopxyis", "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456\u0455", strict=True)
        ),
        **dict(
            zip(
                "ABEHIKMOPTX",
                "\u0391\u0392\u0395\u0397\u0399\u039a\u039c\u039f\u03a1\u03a4\u03a7",
                strict=True,
            )
        ),
    }
)
SMALL_CAPITALS = str.maketrans("abcdefghijklmnopqrstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘǫʀꜱᴛᴜᴠᴡʏᴢ")
STACKED_MARKS = "\u0300\u0302\u0306\u030a\u0316\u0324\u032e\u0334\u035c"


def seeded(name: str, text: str) -> random.Random:
    """Return a generator that depends on nothing but the transformation and the text."""
    return random.Random(zlib.crc32(f"{name}\0{text}".encode()))


def is_plain_letter(char: str) -> bool:
    """Tell whether `char` is an ASCII letter."""
    return char.isascii() and char.isalpha()


def shifted_letters(text: str, upper: int, lower: int) -> str:
    """Replace A and a by the characters with these codes, and so on."""
    return "".join(
        chr((upper if char.isupper() else lower) + ord(char.lower()) - ord("a"))
        if is_plain_letter(char)
        else char
        for char in text
    )


def interspersed(name: str, text: str, alphabet: str) -> str:
    """Put a random character of `alphabet` after every letter."""
    rng = seeded(name, text)
    return "".join(char + rng.choice(alphabet) if char.isalpha() else char for char in text)


def tag_characters(text: str) -> str:
    """Hide the text in Unicode tag characters behind an innocent sentence."""
    return COVER + "".join(chr(0xE0000 + ord(char)) for char in text if " " <= char <= "~")


def variation_selectors(text: str) -> str:
    """Hide the bytes of the text in variation selectors behind an innocent sentence."""
    return COVER + "".join(
        chr(0xFE00 + byte) if byte < 16 else chr(0xE0100 + byte - 16) for byte in text.encode()
    )


def invisible_bits(text: str) -> str:
    """Hide the bits of the text in two invisible mathematical operators."""
    data = text.encode("ascii", "replace")
    return COVER + "".join("\u2064" if bit == "1" else "\u2062" for b in data for bit in f"{b:08b}")


def zero_width(text: str) -> str:
    """Put zero-width characters between the letters."""
    return interspersed("zero_width", text, ZERO_WIDTH)


def bidi_controls(text: str) -> str:
    """Put directional controls between the letters."""
    return interspersed("bidi_controls", text, BIDI)


def soft_hyphens(text: str) -> str:
    """Put soft hyphens between the letters."""
    return interspersed("soft_hyphens", text, "\u00ad")


def homoglyphs(text: str) -> str:
    """Take Cyrillic and Greek letters where they look like Latin ones."""
    return text.translate(HOMOGLYPHS)


def fullwidth(text: str) -> str:
    """Write in fullwidth forms."""
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def math_bold(text: str) -> str:
    """Write in mathematical bold letters."""
    return shifted_letters(text, 0x1D400, 0x1D41A)


def math_script(text: str) -> str:
    """Write in mathematical bold script letters."""
    return shifted_letters(text, 0x1D4D0, 0x1D4EA)


def circled(text: str) -> str:
    """Write in circled letters."""
    return shifted_letters(text, 0x24B6, 0x24D0)


def black_boxes(text: str) -> str:
    """Write in white letters on black boxes."""
    return shifted_letters(text, 0x1F170, 0x1F170)


def flag_letters(text: str) -> str:
    """Write in regional indicators, which make flags in pairs, a space after each."""
    return " ".join(shifted_letters(word, 0x1F1E6, 0x1F1E6) for word in text.replace(" ", "  "))


def small_capitals(text: str) -> str:
    """Write in phonetic small capitals."""
    return text.lower().translate(SMALL_CAPITALS)


def accents(text: str) -> str:
    """Put an accent on every letter."""
    return "".join(char + "\u0301" if is_plain_letter(char) else char for char in text)


def strikethrough(text: str) -> str:
    """Strike every letter through."""
    return "".join(char + "\u0336" if char.isalpha() else char for char in text)


def zalgo(text: str) -> str:
    """Bury every letter under combining marks."""
    rng = seeded("zalgo", text)
    return "".join(
        char + "".join(rng.choices(STACKED_MARKS, k=rng.randint(3, 7))) if char.isalpha() else char
        for char in text
    )


def leet(text: str) -> str:
    """Write digits for letters."""
    return text.translate(LEET)


def separated(text: str, separator: str, gap: str) -> str:
    """Put `separator` between the letters and `gap` between the words."""
    return gap.join(separator.join(word) for word in text.split())


def spaced(text: str) -> str:
    """Put a space between the letters and three between the words."""
    return separated(text, " ", "   ")


def spaced_evenly(text: str) -> str:
    """Put a space between the letters and nothing else between the words."""
    return separated(text, " ", " ")


def dotted(text: str) -> str:
    """Put a dot between the letters."""
    return separated(text, ".", " ")


def dashed(text: str) -> str:
    """Put a dash between the letters."""
    return separated(text, "-", " ")


def underscored(text: str) -> str:
    """Put an underscore between the letters."""
    return separated(text, "_", " ")


def one_letter_a_line(text: str) -> str:
    """Put every letter on a line of its own, an empty line between words."""
    return separated(text, "\n", "\n\n")


def one_word_a_line(text: str) -> str:
    """Put every word on a line of its own."""
    return "\n".join(text.split())


def words_underscored(text: str) -> str:
    """Put underscores between the words."""
    return "_".join(text.split())


def words_quoted(text: str) -> str:
    """Put every word in quotes, commas between them."""
    return ", ".join(f'"{word}"' for word in text.split())


def base64_standard(text: str) -> str:
    """Encode in base64."""
    return base64.b64encode(text.encode()).decode()


def base64_url(text: str) -> str:
    """Encode in URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def base64_wrapped(text: str) -> str:
    """Encode in base64, lines of 32."""
    encoded = base64_standard(text)
    return "\n".join(encoded[at : at + 32] for at in range(0, len(encoded), 32))


def base64_twice(text: str) -> str:
    """Encode in base64, and that again."""
    return base64_standard(base64_standard(text))


def base64_of_rot13(text: str) -> str:
    """Encode in ROT13, and that in base64."""
    return base64_standard(rot13(text))


def hex_digits(text: str) -> str:
    """Encode in hexadecimal."""
    return text.encode().hex()


def hex_spaced(text: str) -> str:
    """Encode in hexadecimal, a space between the bytes."""
    return text.encode().hex(" ")


def percent(text: str) -> str:
    """Encode every byte as a percent escape."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


def quoted_printable(text: str) -> str:
    """Encode every byte as in mail, lines of 75."""
    encoded = "".join(f"={byte:02X}" for byte in text.encode())
    return "=\n".join(encoded[at : at + 75] for at in range(0, len(encoded), 75))


def html_entities(text: str) -> str:
    """Encode every character as a numeric HTML entity."""
    return "".join(f"&#{ord(char)};" for char in text)


def html_entities_some(text: str) -> str:
    """Encode every other letter as a hexadecimal HTML entity."""
    return "".join(
        f"&#x{ord(char):x};" if char.isalpha() and at % 2 == 0 else char
        for at, char in enumerate(text)
    )


def backslash_escapes(text: str) -> str:
    r"""Encode every UTF-16 unit as ``\uXXXX``."""
    data = text.encode("utf-16-be")
    return "".join(f"\\u{data[at]:02x}{data[at + 1]:02x}" for at in range(0, len(data), 2))


def rot13(text: str) -> str:
    """Turn the alphabet by half."""
    return codecs.encode(text, "rot13")


def backwards(text: str) -> str:
    """Write the whole text backwards."""
    return text[::-1]


def words_backwards(text: str) -> str:
    """Write each word backwards."""
    return " ".join(word[::-1] for word in text.split())


def random_case(text: str) -> str:
    """Make letters capital at random."""
    rng = seeded("random_case", text)
    return "".join(char.upper() if rng.random() < 0.5 else char.lower() for char in text)


def typos(text: str) -> str:
    """Swap two neighbouring letters inside every word of five letters or more."""
    rng = seeded("typos", text)
    words = []
    for word in text.split(" "):
        if len(word) >= 5:
            at = rng.randint(1, len(word) - 3)
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words.append(word)
    return " ".join(words)


TRANSFORMS: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (
        tag_characters,
        variation_selectors,
        invisible_bits,
        zero_width,
        bidi_controls,
        soft_hyphens,
        homoglyphs,
        fullwidth,
        math_bold,
        math_script,
        circled,
        black_boxes,
        flag_letters,
        small_capitals,
        accents,
        strikethrough,
        zalgo,
        leet,
        spaced,
        spaced_evenly,
        dotted,
        dashed,
        underscored,
        one_letter_a_line,
        one_word_a_line,
        words_underscored,
        words_quoted,
        base64_standard,
        base64_url,
        base64_wrapped,
        base64_twice,
        base64_of_rot13,
        hex_digits,
        hex_spaced,
        percent,
        quoted_printable,
        html_entities,
        html_entities_some,
        backslash_escapes,
        rot13,
        backwards,
        words_backwards,
        random_case,
        typos,
    )
}


def main() -> None:
    """Disguise the lines of standard input with the transformation that is named."""
    function = TRANSFORMS[sys.argv[1]]
    for line in sys.stdin:
        sys.stdout.write(function(line.rstrip("\n")) + "\n")


if __name__ == "__main__":
    main()
