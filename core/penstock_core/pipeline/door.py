"""The door: prompts become tokens here, and requests that cannot be honoured are refused here, by name.

Any thread may call it. What passes will run: nothing behind the door checks again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from penstock_core.models.tokenizer import Tokenizer
from penstock_core.pipeline.requests import EngineRequest
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import GenerationRequest
from penstock_core.sampling import SamplingTable


class RequestDoor:
    """Encodes and validates.

    Args:
        served_name: the only model name that requests may ask for.
        max_model_len: longest prompt plus output in tokens.
        new_table: makes the one-row sampling table that checks sampling options.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        served_name: str,
        vocab_size: int,
        max_model_len: int,
        new_table: Callable[[int], SamplingTable],
    ) -> None:
        self._tokenizer = tokenizer
        self._served_name = served_name
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._table = new_table(1)
        self._lock = threading.Lock()  # the table remembers the options it saw last

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of a request's prompt, in whichever of its forms.

        Raises:
            InvalidRequest: it asks for another model, or its prompt gives no tokens.
        """
        if request.model is not None and request.model != self._served_name:
            raise InvalidRequest("model", f"{request.model!r} is not served here, {self._served_name!r} is")
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.messages is not None:
            field = "messages"
            text = self._tokenizer.apply_chat_template([message.model_dump() for message in request.messages])
            tokens = self._tokenizer.encode(text, add_special=False)
        else:
            field = "prompt"
            tokens = self._tokenizer.encode(request.prompt or "")
        if not tokens:
            raise InvalidRequest(field, "gives no tokens with this model's tokenizer; send a longer one")
        return tokens

    def validate(self, request: EngineRequest) -> None:
        """Refuse what cannot be honoured.

        Raises:
            InvalidRequest: naming field, value, limit and remedy.
        """
        prompt, params = request.prompt_token_ids, request.sampling
        if len(prompt) == 0:
            raise InvalidRequest("prompt_token_ids", "is empty; give at least one token")
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise InvalidRequest(
                "prompt",
                f"{len(prompt)} tokens leave no room for output in the context of {self._max_model_len} tokens; "
                f"shorten it to at most {self._max_model_len - 1}",
            )
        for worst in (max(prompt), min(prompt)):
            if not 0 <= worst < self._vocab_size:
                raise InvalidRequest(
                    "prompt_token_ids", f"token id {worst} is outside the vocabulary of {self._vocab_size} tokens"
                )
        if params.min_tokens > room:
            raise InvalidRequest(
                "sampling.min_tokens",
                f"{params.min_tokens} is above the {room} tokens that a prompt of {len(prompt)} leaves of the context",
            )
        self._check_resume(request, min(room, params.max_tokens or room))
        with self._lock:
            self._table.check(params)

    def _check_resume(self, request: EngineRequest, limit: int) -> None:
        params = request.sampling
        indices = [choice.index for choice in request.resume]
        if len(set(indices)) != len(indices) or any(not 0 <= index < params.num_choices for index in indices):
            raise InvalidRequest("resume", f"choices {indices} are not among the {params.num_choices} of the request")
        for choice in request.resume:
            tokens = choice.token_ids
            if len(tokens) > limit:
                raise InvalidRequest(
                    "resume", f"choice {choice.index} has {len(tokens)} tokens, above its limit {limit}"
                )
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
                raise InvalidRequest("resume", f"choice {choice.index} has a token outside the vocabulary")
            if params.logprobs is not None and len(choice.logprobs or ()) != len(tokens):
                raise InvalidRequest(
                    "resume",
                    f"choice {choice.index} has {len(choice.logprobs or ())} logprobs for {len(tokens)} tokens",
                )
            if params.num_choices > params.n and len(tokens):
                raise InvalidRequest("resume", "best_of publishes nothing before its end, so nothing can be resumed")
