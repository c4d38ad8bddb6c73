"""The groups of the calibration text: each can be left out as a source of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import attacks, benign, machine
from .dice import Dice
from .escapes import escapes
from .grammar import Grammar
from .rows import Draft

__all__ = ["GROUPS", "Group"]


@dataclass(frozen=True)
class Group:
    """A source of drafts.

    Attributes
    ----------
    name : str
        Rows carry it as ``authored/<name>``.
    share : float
        How many rows the group has in proportion to the others.
    write : callable
        One text, or the two of a pair.
    """

    name: str
    share: float
    write: Callable[[Grammar, Dice], list[Draft]]


_MAIL = ["email", "thread", "newsletter", "calendar", "chat"]
_WEB = ["html", "page", "shop", "search", "rss", "subtitle"]
_PUBLIC = ["review", "forum", "social", "listing", "shop"]
_TOOLS = ["json", "yaml", "csv", "sql", "ticket", "search"]
_CODE = ["issue", "python", "csource", "log", "readme", "config"]
_HOUSEHOLD = ["recipe", "manual", "todo", "exam", "notice"]
_OFFICE = ["resume", "minutes", "invoice", "contract", "pdf", "medical", "slides"]

_ATTACKS = (
    # Pairs: half of these rows are the clean documents.
    Group("slipped_orders", 3.6, attacks.slipped),
    Group("mail_injections", 2.4, attacks.attack_in_document(_MAIL)),
    Group("web_injections", 2.0, attacks.attack_in_document(_WEB)),
    Group("public_injections", 1.5, attacks.attack_in_document(_PUBLIC)),
    Group("tool_injections", 2.6, attacks.attack_in_document(_TOOLS)),
    Group("code_injections", 2.2, attacks.attack_in_document(_CODE)),
    Group("office_injections", 2.0, attacks.attack_in_document(_OFFICE)),
    Group("household_injections", 1.0, attacks.attack_in_document(_HOUSEHOLD)),
    Group("pasted_injections", 1.0, attacks.attack_in_paste),
    Group("foreign_injections", 1.5, attacks.foreign),
    # For the direction of other languages alone, see `calibration.corpus.for_other_languages`.
    Group("language_attacks", 6.5, attacks.native),
    Group("ciphers", 0.5, attacks.disguised),
    Group(
        "overrides",
        1.8,
        attacks.direct(
            [
                "instruction_override",
                "instruction_override",
                "authority",
                "fresh_start",
                "terse_order",
                "terse_order",
            ]
        ),
    ),
    Group(
        "personas",
        1.5,
        attacks.direct(["roleplay", "roleplay", "fiction", "hypothetical", "opposite_day"]),
    ),
    Group(
        "extraction",
        1.4,
        attacks.direct(
            [
                "direct_extraction",
                "indirect_extraction",
                "pretext_extraction",
                "secret_extraction",
            ]
        ),
    ),
    Group(
        "conversations",
        1.2,
        attacks.direct(
            ["fake_turn", "many_shot", "multi_turn", "refusal_suppression", "payload_splitting"]
        ),
    ),
    Group(
        "influence",
        1.2,
        attacks.direct(["memory_poisoning", "conditional_trigger", "persuasion", "unsafe_request"]),
    ),
)

_BENIGN = (
    Group("requests", 2.0, benign.section("request", "request", "user", typed=True)),
    Group(
        "near_requests",
        2.2,
        benign.section("near", "near_request", "user", "hard_benign", typed=True),
    ),
    Group("pasted_requests", 1.3, benign.pasted),
    Group("role_prompts", 1.4, benign.section("role.system", "role_prompt", "user", "hard_benign")),
    Group(
        "notorious_words",
        0.7,
        benign.section("notorious", "notorious_words", "document", "hard_benign"),
    ),
    Group(
        "notorious_requests",
        0.2,
        benign.section("trigger.request", "notorious_words", "user", "hard_benign", typed=True),
    ),
    Group("orders_to_people", 1.7, benign.section("people", "orders_to_people", "document")),
    Group("asides", 2.3, benign.asides),
    Group("ai_texts", 0.8, benign.section("ai", "about_assistants", "document", "hard_benign")),
    Group(
        "security_texts",
        1.0,
        benign.section("security", "security_teaching", "document", "hard_benign"),
    ),
    Group(
        "security_requests",
        0.9,
        benign.section("security.request", "security_teaching", "user", "hard_benign"),
    ),
    Group("exercises", 0.6, benign.section("maths", "mathematics", "user")),
    Group("code", 0.8, benign.technical),
    Group("machine_made", 0.35, machine.machine_made),
    Group("escapes", 0.25, escapes),
    Group("chatter", 0.6, benign.section("chatter", "chatter", "user", typed=True)),
    Group("documents", 1.0, benign.documents),
    Group("prose", 0.5, benign.prose),
    Group("foreign_texts", 2.0, benign.foreign),
    # For that direction alone too.
    Group("language_texts", 5.4375, benign.native),
)

GROUPS: tuple[Group, ...] = _ATTACKS + _BENIGN
