"""The schema of `rlzoo eval`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

import tyro

from ..backends.protocol import NucleusShare, TemperatureOrGreedy
from ..config import BackendOptions, overlay, to_plain
from ..options import Options, Seed
from ..sampling.base import MOST_LEAVES, Leaves, Levels, Sampler, Tokens
from ..sampling.chains import Chains
from ..sampling.segments import Segments

OURS = ("capacity", "threads", "max_context", "timeout_s")  # options of the backend that mean something where a server samples


@dataclass(frozen=True)
class SegmentOptions(Options):
    """How trees of segments grow, see the sampler `segments`; its width is k, a segment is the response limit / depth."""

    section: ClassVar[str] = "segments"

    depth: Levels = 8
    """Most segments on a path; has to divide the response limit."""
    branching: tuple[Leaves, ...] = (2,)
    """Continuations of a path at a boundary: one number, or the least and the most of a draw."""
    initial: tuple[Leaves, ...] = (2, 8)
    """Copies of the prompt at the start: one number, or the least and the most of a draw per problem."""


@dataclass(frozen=True)
class EvalConfig(Options):
    """Everything that decides what an evaluation measures.

    Raises:
        ValueError: a value is out of range, or two of them do not fit together.
    """

    model: Annotated[str, tyro.conf.Positional] = ""
    """The embedded model (tiny), a local folder, or a hub id."""
    suite: str = "mini"
    """Suite of test sets."""
    data_dir: str = ""
    """Folder with the test sets as local files; without it they are made or downloaded."""
    k: Leaves | None = None
    """Sampled responses per problem; none: what the suite says for each set."""
    greedy: bool = False
    """Decode every problem greedily too."""
    temperature: TemperatureOrGreedy = 1.0
    """Sampling temperature; 0 is greedy and needs k = 1."""
    top_p: NucleusShare = 1.0
    """Nucleus sampling; 1 switches it off."""
    max_response_tokens: Tokens = 256
    """Longest response, tokens."""
    template: str | None = None
    """Prompt template: plain, qwen-boxed, chat, or package.module:function; none: that of the suite's sets."""
    vote: Literal["equivalent", "string"] = "equivalent"
    """What counts as one candidate in the majority vote: answers that the grader takes for the same, or equal strings."""
    sampler: Literal["chains", "segments"] = "chains"
    """chains: independent responses; segments: a tree per problem."""
    segments: SegmentOptions = field(default_factory=SegmentOptions)
    """For --sampler segments."""
    seed: Seed = 0
    """What the samples depend on."""
    backend: BackendOptions = field(default_factory=BackendOptions)
    backend_url: str = ""
    """Sample with the completions server at this address, which has to serve the model; of MODEL only tokenizer and configs are read."""
    served_model: str = ""
    """The server's name for the model; needed where it serves several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler_of(self.k if self.k is not None else MOST_LEAVES)  # validates
        for option in fields(BackendOptions) if self.backend_url else ():
            value = getattr(self.backend, option.name)
            if option.name not in OURS and value != option.default:
                raise ValueError(f"backend.{option.name} = {value!r} does not go with backend_url: that is the server's to decide")
        if self.served_model and not self.backend_url:
            raise ValueError(f"served_model = {self.served_model!r} needs backend_url, the server's address")

    def sampler_of(self, k: int) -> Sampler:
        """The sampler that grows a problem's k responses.

        Raises:
            ValueError: k < 1, or it does not fit the other options.
        """
        if k < 1:
            raise ValueError(f"k is {k}; at least 1 response per problem is needed")
        if self.temperature == 0 and (k > 1 or self.greedy):
            raise ValueError(
                "temperature 0 is greedy decoding, where all samples of a problem would be the same: use --k 1 without --greedy, or a "
                "temperature above 0"
            )
        try:
            return self._sampler(k, {"temperature": self.temperature, "top_p": self.top_p})
        except ValueError as error:  # told with the names that these options have here
            said = str(error).replace("sampler.width", "k").replace("sampler.initial", "segments.initial")
            raise ValueError(said.replace("sampler.branching", "segments.branching").replace("sampler.", "")) from error

    def _sampler(self, k: int, shared: dict[str, Any]) -> Sampler:
        if self.sampler == "chains":
            return Chains(group_size=k, max_response_tokens=self.max_response_tokens, **shared)
        tree = self.segments
        if self.max_response_tokens % tree.depth:
            raise ValueError(
                f"segments.depth is {tree.depth}, which does not divide max_response_tokens = {self.max_response_tokens}: segments of "
                "one length cannot fill the responses; choose another depth or limit"
            )
        length = self.max_response_tokens // tree.depth
        return Segments(width=k, depth=tree.depth, segment_tokens=length, branching=tree.branching, initial=tree.initial, **shared)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.toml; `from_dict` reads it back."""
        made: dict[str, Any] = to_plain(self)
        return made

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], origin: str) -> EvalConfig:
        """A config out of the tables of `origin`, defaults where they say nothing.

        Raises:
            ValueError: unknown key, or a value of the wrong type or out of range.
        """
        made: EvalConfig = overlay(cls(), tables, origin)
        return made
