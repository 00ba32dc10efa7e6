"""OpenAI's request bodies, and how they become jobs.

Every field is honoured or refused by name; none is accepted and ignored. Beside OpenAI's own fields stand a few of this
queue's (`priority`, `deadline_s`, `top_k`, ...), which the official client sends with `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from penstock_core.protocol.requests import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARS,
    MAX_PROMPT_TOKENS,
    MAX_SEED,
    PRIORITY_DEFAULT,
    PRIORITY_HIGHEST,
    PRIORITY_LOWEST,
    ChatMessage,
    GenerationRequest,
    JobOptions,
    ResponseFormat,
    SamplingParams,
    TokenId,
    invalid_request,
)

UNSUPPORTED = frozenset(
    {
        "audio", "conversation", "function_call", "functions", "include", "max_tool_calls", "modalities",
        "parallel_tool_calls", "prediction", "previous_response_id", "prompt_cache_key", "reasoning",
        "reasoning_effort", "safety_identifier", "service_tier", "suffix", "text", "tool_choice", "tools",
        "top_logprobs", "truncation", "verbosity", "web_search_options",
    }
)  # fmt: skip
"""OpenAI's fields that are refused, so that their refusal need not speak of spelling."""

MAX_PROMPTS = 128
MAX_TOP_LOGPROBS = 20

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Label = Annotated[str, StringConstraints(max_length=64)]
_JSON_OBJECT = {"type": "object"}


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream tells beside the tokens."""

    include_usage: bool = False


class TextPart(_Body):
    """A part of a message's content. Parts other than text are refused."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One turn. A model without tools has no tool calls, so there are none to send back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    refusal: None = None

    def turn(self) -> ChatMessage:
        """The message as the model's template takes it: `developer` is OpenAI's later name for `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=content)


class JsonSchema(_Body):
    """A named schema. It is always enforced, so `strict` may be given and changes nothing."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class FormatText(_Body):
    """No constraint."""

    type: Literal["text"]


class FormatJsonObject(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class FormatJsonSchema(_Body):
    """JSON that the schema admits."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[FormatText | FormatJsonObject | FormatJsonSchema, Field(discriminator="type")]


class GenerationBody(_Body):
    """What chats and plain completions have in common.

    Attributes:
        user: kept with the job as metadata `user`.
        priority, deadline_s, top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids: this queue's
            own; see `JobOptions` and `SamplingParams`.
    """

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None

    priority: Annotated[int, Field(ge=PRIORITY_LOWEST, le=PRIORITY_HIGHEST)] | None = None
    deadline_s: Annotated[float, Field(gt=0.0, le=30 * 86_400.0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _usage_only_in_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no meaning without stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, **values: Any) -> SamplingParams:
        """The options given, under their names here and in `values`; raises `InvalidRequest`."""
        for name in (
            "temperature", "top_p", "n", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
            "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
        ):  # fmt: skip
            given = getattr(self, name)
            if given is not None:
                values.setdefault(name, given)
        if self.stop is not None:
            values["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        try:
            return SamplingParams.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error) from None

    def _metadata(self) -> dict[str, str]:
        return {} if self.user is None else {"user": self.user}

    def delivery(self, tenant: str, **more: Any) -> JobOptions:
        """How its jobs are delivered."""
        values: dict[str, Any] = {"tenant": tenant, "deadline_s": self.deadline_s, **more}
        values.setdefault("priority", PRIORITY_DEFAULT if self.priority is None else self.priority)
        metadata = self._metadata() | values.pop("metadata", {})
        return JobOptions.parse(values | {"metadata": metadata or None})


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "penstock-story",
                    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
                    "max_tokens": 64,
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: Format | None = None
    metadata: Annotated[dict[Label, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)] | None = (
        None
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no meaning without logprobs: true")
        return self

    def jobs(self) -> list[GenerationRequest]:
        """The one generation asked for. Raises `InvalidRequest`."""
        sampling = self._sampling(
            max_tokens=self.max_tokens or self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            response_format=_constraint(self.response_format),
        )
        turns = tuple(message.turn() for message in self.messages)
        return [GenerationRequest(messages=turns, sampling=sampling, model=self.model)]

    def _metadata(self) -> dict[str, str]:
        return (self.metadata or {}) | super()._metadata()


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. As OpenAI's, it writes 16 tokens unless told otherwise."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "penstock-story", "prompt": "The miller lost her", "max_tokens": 64}]}
    )

    prompt: Prompt | TokenIds | Annotated[list[Prompt | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def jobs(self) -> list[GenerationRequest]:
        """One generation per prompt. Raises `InvalidRequest`."""
        values: dict[str, Any] = {"max_tokens": self.max_tokens or 16, "logprobs": self.logprobs}
        values |= {"best_of": self.best_of, "echo": bool(self.echo)}
        sampling = self._sampling(**values)
        return [
            GenerationRequest(prompt=prompt, sampling=sampling, model=self.model)
            if isinstance(prompt, str)
            else GenerationRequest(prompt_token_ids=tuple(prompt), sampling=sampling, model=self.model)
            for prompt in self._prompts()
        ]

    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


def _constraint(wanted: Format | None) -> ResponseFormat | None:
    if isinstance(wanted, FormatJsonObject):
        return ResponseFormat(json_schema=_JSON_OBJECT)
    if isinstance(wanted, FormatJsonSchema):
        return ResponseFormat(json_schema=wanted.json_schema.schema_)
    return None
