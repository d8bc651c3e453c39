"""Options that several commands share, each said once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from starmesh.v1 import inference_pb2, sequence_pb2

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="STARMESH_ADDRESS", metavar="HOST:PORT", help="The router.")
]
DEFAULT_ADDRESS = "127.0.0.1:50051"
# What the wire can carry; the router says what makes sense.
_INT32 = (-(2**31), 2**31 - 1)

Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw", help="Hold a conversation, or continue the text as it is. (default: --chat if the model can)"
    ),
]
System = Annotated[str, typer.Option(metavar="TEXT", help="System message of the conversation.")]
MaxOutputTokens = Annotated[
    int | None,
    typer.Option(
        "--max-output-tokens", "-n", min=_INT32[0], max=_INT32[1], help="Limit of the answer. (default: what fits)"
    ),
]
Temperature = Annotated[float | None, typer.Option(help="0 to 2; 0 is greedy. (default: 1)")]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens up to this probability, over 0 to 1. (default: 1)")
]
TopK = Annotated[
    int | None, typer.Option(min=_INT32[0], max=_INT32[1], help="Keep this many of the likeliest tokens; 0 is all.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divide the logits of tokens already seen, over 0 to 10. (default: 1)")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]
Seed = Annotated[int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of the sampling. (default: random)")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to a file as JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a prompt is put to the model; None leaves a choice to the router."""

    chat: bool | None = None
    system: str = ""
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def request(self, prompt: str, *, chat: bool) -> inference_pb2.GenerateRequest:
        """The request for ``prompt``: ``chat`` is the decision where ``self.chat`` is None."""
        from starmesh.v1 import inference_pb2

        request = inference_pb2.GenerateRequest(sampling=self._sampling())
        if self.chat if self.chat is not None else chat:
            if self.system:
                request.chat.messages.add(role="system", content=self.system)
            request.chat.messages.add(role="user", content=prompt)
        else:
            request.text = prompt
        return request

    def _sampling(self) -> sequence_pb2.SamplingParams:
        from starmesh.v1 import sequence_pb2

        return sequence_pb2.SamplingParams(
            max_output_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            stop_strings=self.stop_strings,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
        )
