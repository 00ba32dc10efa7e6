"""What a producer asks for: the prompt, the sampling options and the delivery options of one job.

Validated with pydantic at the edges (SDK, CLI, HTTP), then frozen. `SamplingParams` is the single definition of the
sampling options; the engine reads the same object. Never imports torch.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.keys import DEFAULT_TENANT as DEFAULT_TENANT
from penstock_core.protocol.keys import TENANT_PATTERN
from penstock_core.protocol.refusals import first_problem, place_of, refusal

MAX_PROMPT_TOKENS = 1_048_576
MAX_PROMPT_CHARS = 4_194_304
MAX_MESSAGES = 4096
MAX_NEW_TOKENS = 1_048_576
MAX_CHOICES = 64
MAX_SEED = 2**63 - 1
PRIORITY_LOWEST, PRIORITY_DEFAULT, PRIORITY_HIGHEST = 0, 5, 9

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def pack_ids(ids: Sequence[Any]) -> array[int] | None:
    """A prompt's ids as 32-bit integers, or None where one of them is not plainly what `TokenId` says."""
    try:
        packed = array("i", ids)  # refuses what is no integer, and what is beyond 32 bits
    except (TypeError, OverflowError):
        return None
    if packed.itemsize == 4 and sys.byteorder == "little":
        return packed if packed.tobytes()[3::4].isascii() else None  # the highest bit of a negative number is set
    return packed if not ids or min(packed) >= 0 else None


def _ids_at_once(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A whole prompt at once: a constraint on each element costs eight times as much. `validate` says what is wrong."""
    if type(value) is list or type(value) is tuple:
        ids = pack_ids(value)
        if ids is not None and 0 < len(ids) <= MAX_PROMPT_TOKENS:
            return tuple(ids)
    return validate(value)


def _in_range(ids: tuple[int, ...]) -> tuple[int, ...]:
    if ids and (min(ids) < 0 or max(ids) >= 2**31):
        position = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < 2**31)
        raise ValueError(f"the id at position {position} is {ids[position]}; token ids are from 0 to {2**31 - 1}")
    return ids


Tenant = Annotated[str, StringConstraints(pattern=TENANT_PATTERN)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate `values`; raise `InvalidRequest` that names the first offending field."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise invalid_request(error) from None


_R = TypeVar("_R", bound=_Record)


def invalid_request(error: ValidationError, prefix: str = "") -> InvalidRequest:
    """Turn pydantic's report into one `InvalidRequest` naming field, value and limit of the first problem."""
    first = first_problem(error.errors(include_url=False))
    field = place_of(first["loc"])
    field = prefix + field if field else prefix.removesuffix(".") or "request"
    more = error.error_count() - 1
    return InvalidRequest(field, refusal(first) + (f" (and {more} more)" if more else ""))


class ResponseFormat(_Record):
    """A constraint on the output text: exactly one of the fields is set.

    Attributes:
        json_schema: a JSON schema (object), or `{}` for any JSON value.
        regex: a regular expression the whole output must match.
        choice: the output is one of these strings.
        grammar: a Lark-like grammar, as llguidance reads it.
    """

    json_schema: dict[str, Any] | None = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=16_384)] | None = None
    choice: Annotated[tuple[str, ...], Field(min_length=1, max_length=4096)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=262_144)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json_schema, regex, choice, grammar; got {given or 'none'}")
        return self


class SamplingParams(_Record):
    """How tokens are chosen. Greedy when `temperature` is 0.

    Every option is honoured or the request is refused; none is ignored. With `seed` set (the client always sets one),
    the tokens are a pure function of prompt, options and seed, whatever the batch around the request.

    Attributes:
        temperature: 0 is greedy; otherwise divides the log-probabilities.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        min_p: drop tokens less likely than min_p times the most likely one.
        n: number of choices returned; `best_of` choices are generated and the n with the highest mean log-probability
            are returned (then no token stream is published before the end).
        max_tokens: output limit per choice. None: as much as the model's context allows.
        min_tokens: end-of-sequence and stop ids are not sampled, and stop strings not matched, before this many tokens.
        stop: strings that end a choice; cut from the text unless `include_stop`.
        stop_token_ids: token ids that end a choice; their text is cut unless `include_stop`.
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the output so far (as OpenAI does).
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and output (CTRL).
        logit_bias: token id -> added to its logit.
        allowed_token_ids: only these tokens are sampled.
        bad_words: strings whose token sequences are never completed.
        logprobs: number of alternatives reported per output token (0: only the chosen one); None: no log-probabilities.
        prompt_logprobs: the same for the prompt's tokens.
        echo: the text begins with the prompt.
        response_format: constrains the text; see `ResponseFormat`.
        skip_special_tokens: leave special tokens out of the text.
    """

    temperature: Annotated[Finite, Field(ge=0.0, le=100.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[Finite, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[Finite, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = 256
    min_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] = 0
    stop: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    presence_penalty: Annotated[Finite, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0.0, le=10.0)] = 1.0
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100.0, le=100.0)]], Field(max_length=1024)] | None
    ) = None
    allowed_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=65_536)] | None = None
    bad_words: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=256)
    ] = ()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    response_format: ResponseFormat | None = None
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); lower one")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) is below n ({self.n}); raise best_of or lower n")
        return self

    @property
    def num_choices(self) -> int:
        """Choices generated: `best_of` if set, else `n`."""
        return self.best_of or self.n

    def estimated_output_tokens(self) -> int:
        """Upper estimate of the output in tokens over all choices; 1024 a choice where `max_tokens` is None."""
        return (self.max_tokens or 1024) * self.num_choices


_SCALARS = frozenset({int, float, bool, str, type(None)})


def _single_valued(options: Mapping[str, Any]) -> SamplingParams | None:
    """Options of one value each, validated once for all requests with the same; None where pydantic must see them."""
    rest = dict(options)
    seed = rest.pop("seed", None)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED or not _SCALARS.issuperset(map(type, rest.values())):
        return None
    try:
        known = _known_sampling(tuple(rest.items()), tuple(map(type, rest.values())))
    except ValidationError:
        return None
    return _made(SamplingParams, {**known.__dict__, "seed": seed}, {*rest, "seed"})


@lru_cache(maxsize=1024)
def _known_sampling(options: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> SamplingParams:
    """`types` tells 1 from True."""
    return SamplingParams.model_validate(dict(options))


def _made(model: type[_R], fields: dict[str, Any], given: set[str]) -> _R:
    """A model of fields known to be valid and complete: what `model_construct` makes, four times as fast."""
    made = model.__new__(model)
    object.__setattr__(made, "__dict__", fields)
    object.__setattr__(made, "__pydantic_fields_set__", given)
    object.__setattr__(made, "__pydantic_extra__", None)
    object.__setattr__(made, "__pydantic_private__", None)
    return made


class ChatMessage(_Record):
    """One turn of a conversation, rendered by the model's own chat template."""

    role: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]
    content: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]


class GenerationRequest(_Record):
    """The work itself: one prompt, in exactly one of three forms, and how to sample from it.

    Attributes:
        prompt: plain text, tokenized by the worker with the model's special tokens.
        messages: a conversation, rendered with the model's chat template.
        prompt_token_ids: token ids, used as they are.
        model: served name the worker must have; None accepts whatever the queue serves.
    """

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)] | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt_token_ids: (
        Annotated[
            tuple[int, ...],
            Field(min_length=1, max_length=MAX_PROMPT_TOKENS),
            AfterValidator(_in_range),
            WrapValidator(_ids_at_once),
        ]
        | None
    ) = None
    sampling: SamplingParams = SamplingParams()
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) + (self.messages is None) + (self.prompt_token_ids is None) != 2:
            given = [f for f in ("prompt", "messages", "prompt_token_ids") if getattr(self, f) is not None]
            raise ValueError(f"give exactly one of prompt, messages, prompt_token_ids; got {given or 'none'}")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """As of any record; an ordinary request, of ids and single-valued options, in half the time."""
        ids, sampling = values.get("prompt_token_ids"), values.get("sampling")
        if len(values) == 2 and type(ids) is list and type(sampling) is dict:
            packed, known = pack_ids(ids), _single_valued(sampling)
            if packed is not None and known is not None and 0 < len(ids) <= MAX_PROMPT_TOKENS:
                fields = dict.fromkeys(cls.model_fields)
                fields["prompt_token_ids"], fields["sampling"] = tuple(packed), known
                return _made(cls, fields, {"prompt_token_ids", "sampling"})
        return super().parse(values)

    def estimated_prompt_tokens(self) -> int:
        """Prompt length in tokens: exact for token ids, else UTF-8 bytes / 4 + 1 (the client has no tokenizer)."""
        if self.prompt_token_ids is not None:
            return len(self.prompt_token_ids)
        if self.prompt is not None:
            return len(self.prompt.encode()) // 4 + 1
        return sum(len(m.content.encode()) // 4 + 4 for m in self.messages or ())

    def estimated_output_tokens(self) -> int:
        """As `SamplingParams.estimated_output_tokens`."""
        return self.sampling.estimated_output_tokens()


class JobOptions(_Record):
    """How the job is delivered, apart from what is generated.

    Attributes:
        priority: 0 (least urgent) to 9 (most urgent).
        tenant: whose job it is; fairness, limits and isolation are per tenant.
        deadline_s: seconds from submission after which the job is expired.
        delay_s: seconds from submission before which it is not started. `not_before`: the same as epoch seconds.
        max_retries: retries after errors marked retryable (crashes and drains do not count).
        idempotency_key: the same key of the same tenant returns the same job for as long as that job is retained.
        result_ttl_s: seconds the finished job, its result and its token log are kept.
        affinity: cache-affinity tag; jobs with equal tags prefer the worker that last ran one. None: derived from the
            beginning of the prompt. Empty: no preference.
        metadata: small strings carried along, returned with the status.
        traceparent: W3C trace context of the submitter.
        durability: `memory` returns when Redis has it; `fsync` also waits until the AOF is on disk (Redis >= 7.2).
    """

    priority: Annotated[int, Field(ge=PRIORITY_LOWEST, le=PRIORITY_HIGHEST)] = PRIORITY_DEFAULT
    tenant: Tenant = DEFAULT_TENANT
    deadline_s: Annotated[Finite, Field(gt=0.0, le=30 * 86_400.0)] | None = None
    delay_s: Annotated[Finite, Field(ge=0.0, le=365 * 86_400.0)] | None = None
    not_before: Annotated[Finite, Field(ge=0.0, le=1e11)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    result_ttl_s: Annotated[Finite, Field(gt=0.0, le=30 * 86_400.0)] = 3600.0
    affinity: Annotated[str, StringConstraints(max_length=64)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=1024)],
            ],
            Field(max_length=32),
        ]
        | None
    ) = None
    traceparent: (
        Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")] | None
    ) = None
    durability: Literal["memory", "fsync"] = "memory"

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.delay_s is not None and self.not_before is not None:
            raise ValueError("give delay_s or not_before, not both")
        return self
