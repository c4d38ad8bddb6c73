"""`Firewall`: the front door."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from . import _core
from .alarm import Alarm, AlarmLevel, Origin, Thresholds
from .config import FirewallConfig
from .detector import find_detector
from .errors import AlknetFirewallError, ConfigError, InputError
from .messages import Reading, read_message
from .models import DetectorModel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Firewall", "Stream"]


class Firewall:
    """Screens text before it reaches a large language model.

    A loaded firewall never changes and can be shared by all threads; screening releases the GIL.

    Parameters
    ----------
    detector : str, optional
        Name of a detector, or the path of a detector folder; the embedded one by default.
    codebook_path : str, optional
        Another codebook for the same model.
    thresholds : Thresholds, optional
        Scores at which the level rises.
    max_tokens, engine, threads, isa, early_exit, on_error
        See `FirewallConfig`.
    model : DetectorModel, optional
        Runs the model instead of an engine of this library; it must give the activations that the
        detector's codebook was compiled for. The detector folder then needs a tokenizer and a
        codebook only.
    config : FirewallConfig, optional
        All options at once, instead of the separate ones; neither environment nor file is then
        consulted.

    Raises
    ------
    ConfigError
        If an option is unknown or out of its range.
    ModelLoadError, CodebookError
        If the detector is missing, damaged, or its parts do not belong together.

    Examples
    --------
    >>> from alknet_firewall import Firewall
    >>> fw = Firewall()
    >>> fw.screen("Could you move our meeting to Thursday?").level.name
    'CLEAR'
    """

    def __init__(
        self,
        detector: str | Path | None = None,
        *,
        codebook_path: str | Path | None = None,
        thresholds: Thresholds | None = None,
        max_tokens: int | None = None,
        engine: Literal["native", "candle"] | None = None,
        threads: int | None = None,
        isa: str | None = None,
        early_exit: bool | None = None,
        on_error: Literal["raise", "block"] | None = None,
        model: DetectorModel | None = None,
        config: FirewallConfig | None = None,
    ) -> None:
        arguments: dict[str, Any] = {
            "detector": None if detector is None else str(detector),
            "codebook_path": None if codebook_path is None else str(codebook_path),
            "thresholds": thresholds,
            "max_tokens": max_tokens,
            "engine": engine,
            "threads": threads,
            "isa": isa,
            "early_exit": early_exit,
            "on_error": on_error,
        }
        given = [name for name, value in arguments.items() if value is not None]
        if config is not None and given:
            raise ConfigError(f"config and {given[0]} are given: {given[0]} belongs into config")
        if config is not None and not isinstance(config, FirewallConfig):
            raise ConfigError(f"config is a {type(config).__name__}, which is no FirewallConfig")
        if model is not None and not isinstance(model, DetectorModel):
            raise ConfigError(f"model is a {type(model).__name__}, which is no DetectorModel")
        self.config = options = config or FirewallConfig.load(**arguments)
        self._core = _core.Firewall(
            str(find_detector(options.detector, own_model=model is None)),
            codebook=options.codebook_path,
            suspicious=options.thresholds.suspicious,
            dangerous=options.thresholds.dangerous,
            max_tokens=options.max_tokens,
            engine=options.engine,
            threads=options.threads,
            isa=options.isa,
            early_exit=options.early_exit,
            model=model,
        )

    @property
    def detector(self) -> str:
        """Name of the loaded detector."""
        return self._core.detector

    @property
    def engine(self) -> str:
        """The engine that runs the model, with its instruction set."""
        return self._core.engine

    @property
    def sites(self) -> list[str]:
        """Where activations are read, in the order of the second axis of `activations`."""
        return self._core.sites

    def __repr__(self) -> str:
        return f"Firewall(detector={self.detector!r}, engine={self.engine!r})"

    def screen(self, text: str, *, origin: Origin | None = None) -> Alarm:
        """Screen one text of any length.

        Long texts are read in overlapping segments; the alarm is that of the worst one, corrected
        for their number. Empty text is CLEAR and says so in ``reason``.

        Parameters
        ----------
        text : str
            The text.
        origin : "user", "document" or None
            Who wrote it: the model's user (orders to the model are ordinary), or somebody whose
            text was fetched (they are not). None compares it with benign text of both kinds.

        Returns
        -------
        Alarm

        Raises
        ------
        InputError
            If the text is not a `str` of valid Unicode, or the origin is unknown.
        InferenceError
            If the screening failed: there is no verdict. With ``on_error="block"`` both become a
            DANGEROUS alarm instead.
        """
        try:
            fields = self._core.screen(_checked(text), _checked_origin(origin))
        except AlknetFirewallError as error:
            return self._failed(error, _length(text), origin)
        return Alarm._from_core(fields, self.detector)

    def screen_batch(
        self, texts: Iterable[str], *, origin: Origin | Sequence[Origin | None] | None = None
    ) -> list[Alarm]:
        """Screen several texts in shared passes; each gets the alarm it would get alone.

        Parameters
        ----------
        texts : iterable of str
            The texts.
        origin : "user", "document", None, or a sequence of them
            One for all, or one for each text.

        Returns
        -------
        list of Alarm
            In the order of the texts. Errors are as for `screen`; with ``on_error="block"`` only
            the texts that fail are blocked.
        """
        if isinstance(texts, str | bytes):
            raise InputError("texts must be several texts, not one: use screen for one")
        texts = list(texts)
        origins: list[str | None]
        if origin is None or isinstance(origin, str):
            origins = [origin] * len(texts)
        elif isinstance(origin, Iterable):
            origins = list(origin)
        else:
            origins = [_checked_origin(origin)]  # refuses it
        if len(origins) != len(texts):
            raise InputError(f"{len(texts)} texts have {len(origins)} origins: one each is needed")
        try:
            rows = self._core.screen_batch(
                [_checked(text) for text in texts], [_checked_origin(one) for one in origins]
            )
        except AlknetFirewallError:
            if self.config.on_error == "raise":
                raise
            pairs = zip(texts, origins, strict=True)
            return [self.screen(text, origin=one) for text, one in pairs]  # type: ignore[arg-type]
        return [Alarm._from_core(fields, self.detector) for fields in rows]

    async def ascreen(self, text: str, *, origin: Origin | None = None) -> Alarm:
        """`screen` in a worker thread, so that an event loop goes on meanwhile."""
        return await asyncio.to_thread(self.screen, text, origin=origin)

    def screen_document(self, text: str) -> Alarm:
        """Screen fetched text: a page, an e-mail, a tool result. `screen` with its origin given."""
        return self.screen(text, origin="document")

    def screen_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[Alarm]:
        """Screen chat messages, everything in them with the origin that it has.

        Texts of ``user``, ``system`` and ``developer`` are read as a user's, those of ``tool`` and
        ``function``, results of tools and attached documents as documents, and what the model wrote
        (``assistant``, the arguments of tool calls) as both.

        Parameters
        ----------
        messages : iterable of mappings
            Messages of OpenAI's or Anthropic's chat API, or items of OpenAI's Responses API: a
            ``role`` with ``content`` (a string, None, or a list of parts), ``tool_calls`` and so
            on, or a ``type`` such as ``function_call_output``.

        Returns
        -------
        list of Alarm
            One for each message. The texts of each origin in it are screened together, a line each,
            and the worst alarm counts; its spans are characters of that text, which begins with the
            ``content``. A message with parts that are no text (images, files) or not known is at
            least SUSPICIOUS and says so.

        Raises
        ------
        InputError
            If a message is not of this form or its role is unknown; with ``on_error="block"`` that
            message has a DANGEROUS alarm instead.
        """
        readings = [self._read(message) for message in messages]
        texts = [[] if isinstance(read, Alarm) else read.texts() for read in readings]
        every = [text for own in texts for text in own]
        alarms = iter(
            self.screen_batch([text for _, text in every], origin=[origin for origin, _ in every])
        )
        partly = "the message holds parts that are not text"
        result = []
        for reading, own in zip(readings, texts, strict=True):
            if isinstance(reading, Alarm):
                result.append(reading)
                continue
            worst = max((next(alarms) for _ in own), key=lambda alarm: (alarm.level, alarm.score))
            if not reading.complete:
                worst = worst._at_least(AlarmLevel.SUSPICIOUS, partly)
            result.append(worst)
        return result

    def stream(self, *, origin: Origin | None = None) -> Stream:
        """Start screening a text that arrives in pieces."""
        return Stream(self, self._core.stream(_checked_origin(origin)), origin)

    def activations(self, text: str) -> npt.NDArray[np.float32]:
        """Hidden states of one text at the detector's sites, for research.

        Returns
        -------
        ndarray
            Float32 ``(seq_len, n_sites, hidden_size)``, one row per token of the text.

        Raises
        ------
        ImportError
            If numpy is not installed.
        InputError
            If the text has more tokens than the model reads at once.
        """
        try:
            import numpy  # noqa: F401
        except ImportError:
            raise ImportError(
                "activations need numpy: pip install 'alknet-firewall[numpy]'"
            ) from None
        return self._core.activations(_checked(text))

    def _read(self, message: Mapping[str, Any]) -> Reading | Alarm:
        """What is in a message, or the alarm that stands for what is wrong with it."""
        try:
            return read_message(message)
        except InputError as error:
            return self._failed(error, 0, None)

    def _failed(self, error: AlknetFirewallError, unread: int, origin: Origin | None) -> Alarm:
        if self.config.on_error == "raise":
            raise error
        known = origin if origin in _ORIGINS else None
        return Alarm._blocked(error, self.detector, unread, known)


class Stream:
    """A text that is still arriving; made by `Firewall.stream`.

    Safe to use from several threads; pieces are taken in the order of the calls. As a context
    manager it is finished on leaving, if it is not yet, and ``alarm`` then holds the verdict on the
    whole text.
    """

    def __init__(self, firewall: Firewall, core: _core.Stream, origin: Origin | None) -> None:
        self._firewall = firewall
        self._core = core
        self._origin = origin
        self._lock = threading.Lock()
        self._length = 0
        self._finished = False
        self._blocked: Alarm | None = None
        self.alarm: Alarm | None = None

    def feed(self, chunk: str) -> Alarm:
        """Take the next piece; the alarm on what has been read so far is provisional.

        The last word waits until it is complete; in scripts and codes without spaces at most 128
        bytes and one token wait. Judged is what has a window of tokens (eight, for the embedded
        detector). Disguises are looked for when a text has doubled, and from a kilobyte on with
        every further one.

        The alarm is the worst so far, each part judged as if nothing followed: more text never
        lowers its level, and its spans are those of that part. `finish` has the verdict on the
        whole, which may be milder.

        Raises
        ------
        InputError
            If the piece is not a `str` of valid Unicode, and then it is not part of the text; or
            if the stream is finished or has failed. With ``on_error="block"`` the alarm is
            DANGEROUS instead and stays so to the end.
        """
        with self._lock:
            self._length += _length(chunk)
            return self._take(lambda: self._core.feed(_checked(chunk)))

    def finish(self) -> Alarm:
        """The alarm on the whole text, exactly that of `Firewall.screen`."""
        with self._lock:
            alarm = self._take(self._core.finish)
            self._finished = True
            return alarm

    def _take(self, call: Callable[[], tuple[Any, ...]]) -> Alarm:
        if not self._finished:
            # Should the call fail, there is no alarm.
            self.alarm = self._blocked
        if self._blocked is not None:
            return self._blocked
        try:
            alarm = Alarm._from_core(call(), self._firewall.detector)
        except AlknetFirewallError as error:
            alarm = self._firewall._failed(error, self._length, self._origin)
            if self._finished:  # The verdict on the text stands.
                return alarm
            self._blocked = alarm
        self.alarm = alarm
        return alarm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()


_ORIGINS = ("user", "document", None)


def _checked_origin(origin: Any) -> Any:
    if origin not in _ORIGINS:
        raise InputError('origin must be "user", "document" or None')
    return origin


def _length(text: object) -> int:
    """Characters of what should be a text."""
    return len(text) if isinstance(text, str) else 0


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text must be str, not {type(text).__name__}: decode bytes first")
    return text
