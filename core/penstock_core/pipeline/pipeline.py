"""UnifiedInferencePipeline: from a prompt to tokens, text and statistics, one step at a time.

Joins tokenizer, batcher, engine and sampler. Single-threaded except for `encode`, `validate`, `capacity` and
`statistics`, which any thread may call; an executor drives it. Knows no Redis and no HTTP.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock_core.batching import TokenBatch, TokenBatcher
from penstock_core.cache import PagedAttentionKVCache
from penstock_core.distributed import DistributedInferenceEngine
from penstock_core.models import find_checkpoint
from penstock_core.models.tokenizer import Tokenizer
from penstock_core.pipeline.config import PipelineConfig
from penstock_core.pipeline.door import RequestDoor
from penstock_core.pipeline.drafting import load_draft_engine
from penstock_core.pipeline.intake import Intake
from penstock_core.pipeline.open_requests import OpenRequests
from penstock_core.pipeline.progress import RequestProgress
from penstock_core.pipeline.requests import Capacity, EngineRequest, FinishedRequest, RequestOutput
from penstock_core.pipeline.returns import ReturningTokens, TokenReturns
from penstock_core.pipeline.statistics import Meter, PipelineStatistics
from penstock_core.protocol.errors import EngineFailed, InvalidRequest
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.requests import MAX_SEED, GenerationRequest
from penstock_core.sampling import (
    Detokenizer,
    GrammarCompiler,
    SampledTokens,
    Sampler,
    SamplingTable,
    prompt_logprobs,
)
from penstock_core.speculative import DraftModelProposer, SpeculativeDecoder

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is given to the device and counted as computed; its tokens are on their way."""

    batch: TokenBatch
    returning: ReturningTokens


class UnifiedInferencePipeline:
    """One model, ready to serve.

    Args:
        config: settings.
        engine, tokenizer, draft_engine: given by those who have them already; else loaded as `config` says.
        clock: seconds, monotonic; deadlines and arrival times are on this clock.
        progress: called with (bytes loaded, bytes in all) while the weights stream in.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        engine: DistributedInferenceEngine | None = None,
        tokenizer: Tokenizer | None = None,
        draft_engine: DistributedInferenceEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.clock = clock
        self.tokenizer = tokenizer or Tokenizer.from_checkpoint(find_checkpoint(config.model))
        self.engine = engine or DistributedInferenceEngine.load(config.engine(), progress)
        self.cache = PagedAttentionKVCache(
            self.engine.num_pages,
            self.engine.page_size,
            page_bytes=self.engine.page_bytes,
            prefix_cache=config.prefix_cache,
            host_pages=self.engine.num_host_pages,
        )
        batching = config.batching(self.engine.max_model_len, self.engine.num_pages)
        self.batcher = TokenBatcher(batching, self.cache)
        self._eos_token_ids = _eos_token_ids(self.engine, self.tokenizer)
        self._grammars = None
        if self._eos_token_ids:
            self._grammars = GrammarCompiler(
                self.tokenizer.backend.to_str(), self.tokenizer.vocab_size, self._eos_token_ids
            )
        self._table = self._new_table(config.max_num_sequences)
        self._sampler = Sampler()
        self._speculator: SpeculativeDecoder | None = None
        if config.speculation is not None:
            draft_engine = draft_engine or load_draft_engine(config, config.speculation)
            model = None
            if draft_engine is not None:
                model = DraftModelProposer(draft_engine, self._table, config.max_num_sequences)
            self._speculator = SpeculativeDecoder(config.speculation, model)
        self._door = RequestDoor(
            self.tokenizer,
            served_name=config.name,
            vocab_size=self.engine.config.vocab_size,
            max_model_len=self.engine.max_model_len,
            new_table=self._new_table,
        )
        self._intake = Intake(self.tokenizer, Detokenizer(self.tokenizer), batching, frozenset(self._eos_token_ids))
        self._returns: TokenReturns | None = None
        if config.overlaps(self.engine.device.type):
            self._returns = TokenReturns(self.engine.device, config.max_num_sequences)
        self._launched: _Launched | None = None
        self._requests = OpenRequests(self.batcher)
        self._arrivals = 0
        self._seeds = random.Random(config.seed)
        self._meter = Meter()

    # --- requests ---------------------------------------------------------------------------------------------------

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of a request's prompt; raises InvalidRequest. See `RequestDoor.encode`."""
        return self._door.encode(request)

    def validate(self, request: EngineRequest) -> None:
        """Raise InvalidRequest if the request cannot be honoured. See `RequestDoor.validate`."""
        self._door.validate(request)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request; resumed choices go on where they stopped.

        Raises:
            InvalidRequest: it cannot be honoured, or its id is in use.
        """
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is running already; give every request its own")
        self._door.validate(request)
        progress = self._intake.open(request, self._seeds.randrange(MAX_SEED), self.clock(), self._arrivals)
        self._arrivals += len(progress.choices)
        self._requests.add(progress)

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """End a request; the next step delivers its result as far as it got. Unknown ids are ignored."""
        progress = self._requests.get(request_id)
        if progress is not None:
            self._requests.end(progress, reason)

    def capacity(self) -> Capacity:
        """Room for more requests: each is counted with its longest output, and a page that several share once."""
        total = self.engine.num_pages * self.engine.page_size
        taken = self._requests.reserved_tokens - self.cache.num_saved * self.engine.page_size
        return Capacity(
            free_sequences=max(0, self.config.max_num_sequences - self._requests.sequences),
            free_tokens=min(total, max(0, total - taken)),
            total_tokens=total,
        )

    def statistics(self) -> PipelineStatistics:
        """Counters since the start, and the state of this moment."""
        batcher = self.batcher
        return self._meter.read(
            len(batcher.running),
            len(batcher.waiting),
            batcher.preemptions,
            self.cache.statistics(),
            None if self._speculator is None else self._speculator.statistics(),
            self.engine.memory,
        )

    def close(self) -> None:
        """End every request without a result, give all pages back, and end the engine's other ranks."""
        self._requests.discard()
        if self._launched is not None:
            self.batcher.fail(self._launched.batch)
            self._launched = None
        if self._speculator is not None:
            self._speculator.close()
        self.engine.close()
        self.cache.check(idle=True)

    # --- the step ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to deliver."""
        return self._requests.has_news or self.batcher.has_work or self._launched is not None

    def step(self) -> list[RequestOutput]:
        """Compute one step; at most one output per request.

        With `overlap`, this step is launched before the tokens of the one before are read, and those are delivered: the
        device computes while the host prepares, and a sequence whose end is found late has computed one token too many,
        which is thrown away. Steps whose options need the host (penalties, grammars, log-probabilities, on a GPU top-k
        and top-p) are read at once, as all are without `overlap`.

        An error of the model or the sampler fails the requests of the step, with its message, and no others.
        """
        started = self.clock()
        if self.batcher.holds_nothing and self.cache.num_available != self.cache.num_pages:
            self.cache.check(idle=True)  # raises: a page that leaked would never come back
        for sequence in self.batcher.expire(started):
            self._requests.end_choice(self._requests[sequence.request_id], sequence.index, FinishReason.EXPIRED)
        if self._speculator is not None and self._speculator.due():
            self._propose_drafts(self._speculator)
        batch = self.batcher.schedule()
        if batch is None:
            if self._launched is not None:
                self._settle()
                return self._deliver(self.clock())
            if self.batcher.has_work and not self._requests.has_news:
                raise RuntimeError("the batcher has sequences, but schedules none of them")
            return self._deliver(started)
        ahead, earlier = self._launched, None
        try:
            self._load_rows(batch, started)
            before = self.clock()
            chosen = self._compute(batch)
            if ahead is not None:
                earlier = ahead.returning.read()  # while the device computes this step
            now = self.clock()
            self._meter.forward_s += now - before
        except EngineFailed:
            raise  # no step can follow: whoever drives this pipeline ends its requests
        except Exception as error:
            self._settle()
            self._fail(batch, error)
            return self._deliver(self.clock())
        except BaseException as error:  # an interrupt: leave a state that can go on
            self._fail(batch, error)
            raise
        if ahead is not None and earlier is not None:
            self._launched = None
            self._advance(ahead.batch, SampledTokens(earlier), now)
        if isinstance(chosen, ReturningTokens):
            self.batcher.launch(batch)
            self._launched = _Launched(batch, chosen)
        else:
            self._advance(batch, chosen, now)
        outputs = self._deliver(now)
        self._count_step(batch, self.clock() - started)
        return outputs

    def _propose_drafts(self, speculator: SpeculativeDecoder) -> None:
        """Drafts only save time, so their failure costs no request: speculation is switched off."""
        try:
            speculator.propose(self.batcher.running, self._admissible_tokens())
        except Exception as error:
            _logger.error("drafting failed; speculation is off from now on", exc_info=error)
            self._speculator = None
            for sequence in self.batcher.running:
                sequence.draft_ids = []

    def _compute(self, batch: TokenBatch) -> SampledTokens | ReturningTokens:
        """Run the model, and choose tokens: at once, or without waiting for them where that is possible."""
        if self._launched is None:
            output = self.engine.forward(batch)
        else:
            output = self.engine.forward(batch, self._launched.returning.tokens)
        self._collect_prompt_logprobs(batch)
        if self._returns is not None:
            tokens = self._sampler.launch(self._table, output.logits, batch.sample_rows, batch.output_positions)
            if tokens is not None:
                return self._returns.send(tokens)
        return self._sampler.sample(self._table, output.logits, batch.sample_rows, batch.output_positions, batch.drafts)

    def _settle(self) -> None:
        """Take the tokens of the step that was launched ahead, if there is one."""
        ahead = self._launched
        if ahead is None:
            return
        try:
            tokens = ahead.returning.read()
        except Exception as error:
            self._launched = None
            self._fail(ahead.batch, error)
        else:
            self._launched = None
            self._advance(ahead.batch, SampledTokens(tokens), self.clock())

    def _load_rows(self, batch: TokenBatch, now_s: float) -> None:
        """Bring the sampler's rows in line with the batcher's."""
        for row in batch.vacated:
            self._table.clear(row)
        for sequence in batch.admitted:
            if sequence.admitted_s is None:
                sequence.admitted_s = now_s
            progress = self._requests[sequence.request_id]
            params = progress.params
            if progress.ranked and params.logprobs is None:
                params = params.model_copy(update={"logprobs": 0})
            try:
                prompt = progress.request.prompt_token_ids
                self._table.add(sequence.row, params, progress.seed, sequence.index, prompt, sequence.output_ids)
            except InvalidRequest as error:  # a resumed output that does not follow its grammar
                progress.error = str(error)
                self._requests.end(progress, FinishReason.ERROR)
                continue
            if self._table.complete(sequence.row):  # resumed where its grammar was satisfied already
                self._requests.end_choice(progress, sequence.index, FinishReason.STOP)

    def _collect_prompt_logprobs(self, batch: TokenBatch) -> None:
        """Record the prompt tokens that this step's rows predict, for the sequences that want them."""
        for n, sequence in enumerate(batch.sequences):
            progress = self._requests.get(sequence.request_id) if sequence.wants_prompt_logits else None
            if progress is None or progress.prompt_logprobs is None:
                continue
            start = sequence.num_computed
            end = min(start + batch.query_lens[n], sequence.num_prompt - 1)
            shift = int(batch.query_start[n]) - start
            top = progress.params.prompt_logprobs or 0
            for row, logits in self.engine.prompt_logits(start + shift, end + shift):
                first = row - shift + 1  # a row predicts the token after it
                tokens = sequence.prompt_ids[first : first + len(logits)]
                progress.prompt_logprobs[first : first + len(logits)] = prompt_logprobs(
                    logits, tokens.astype("int64"), top
                )
            if start + batch.query_lens[n] >= sequence.num_prompt:
                sequence.wants_prompt_logits = False

    def _advance(self, batch: TokenBatch, sampled: SampledTokens, now_s: float) -> None:
        """Hand the sampled tokens to the batcher, and what it accepts to the choices."""
        if batch.drafts is not None:
            for sequence, samples in zip(batch.sequences, batch.num_samples, strict=True):
                if samples > 1 and sequence.finish_reason is None:
                    self._requests[sequence.request_id].drafted_tokens += samples - 1
        rows: list[int] = []
        written: list[int] = []
        grown = self.batcher.update(batch, sampled.token_ids.tolist())
        if self._speculator is not None and self._speculator.asked:
            self._speculator.observe(batch, grown)
        for sequence, first, count in grown:
            progress = self._requests[sequence.request_id]
            choice = progress.choices[sequence.index]
            output = sequence.output_ids
            tokens = output[-count:] if count else []
            reason = sequence.finish_reason
            if progress.params.response_format is not None and tokens:
                complete = self._follow_grammar(int(batch.sample_rows[first]), tokens)
                if complete:  # what was accepted beyond its end is not part of the text
                    reason = FinishReason.STOP
                    del output[len(output) - count + complete :], tokens[complete:]
                    count = complete
            if count > 1:
                progress.accepted_tokens += count - 1
            if choice.logprobs is not None:
                records = [sampled.logprob(place) for place in range(first, first + count)]
                choice.logprobs += [record for record in records if record is not None]
            kept = choice.advance(tokens, reason)
            if kept < count:  # a stop string ended it among accepted drafts
                del output[kept - count :]
                if choice.logprobs is not None:
                    del choice.logprobs[kept - count :]
            if choice.finish_reason is not None:
                if sequence.finish_reason is None:
                    self.batcher.finish(sequence, choice.finish_reason)
                if choice.finish_reason is FinishReason.ERROR:
                    progress.error = "no token can be chosen: the options leave none, or the logits are not finite"
                self._requests.close_choice(progress)
            elif progress.params.response_format is None and sequence.is_running:
                rows += [sequence.row] * count
                written += tokens
            if progress.first_token_s is None:
                progress.first_token_s = now_s
            self._requests.changed(progress)
        self._table.append(rows, written)

    def _follow_grammar(self, row: int, tokens: list[int]) -> int:
        """Advance a row's grammar; how many of the tokens complete it, or 0 if it goes on after all of them."""
        for number, token in enumerate(tokens, 1):
            self._table.append([row], [token])
            if self._table.complete(row):
                return number
        return 0

    def _deliver(self, now_s: float) -> list[RequestOutput]:
        """What is new since the last step."""

        def finish(progress: RequestProgress) -> FinishedRequest:
            speculation = None
            if self._speculator is not None:
                speculation = self._speculator.report([choice.sequence for choice in progress.choices])
            result = progress.finish(now_s, speculation)
            self._meter.add_result(result)
            return result

        return self._requests.deliver(finish)

    def _count_step(self, batch: TokenBatch, step_s: float) -> None:
        meter, config = self._meter, self.batcher.config
        meter.steps += 1
        meter.step_s += step_s
        meter.batch_tokens += batch.num_tokens
        meter.batch_sequences += len(batch.sequences)
        meter.sequence_limit += config.max_num_sequences
        meter.token_budget += config.max_batch_tokens
        if self._speculator is not None:
            self._speculator.measure(batch.num_tokens, step_s)
        if self.batcher.budget is not None:
            self.batcher.budget.observe(batch.num_tokens, step_s)

    def _fail(self, batch: TokenBatch, error: BaseException) -> None:
        """End the requests of a step that could not be computed."""
        _logger.error("a step of %d sequences failed", len(batch.sequences), exc_info=error)
        for sequence in self.batcher.fail(batch):
            progress = self._requests[sequence.request_id]
            progress.error = f"{type(error).__name__}: {error}"
            self._requests.end(progress, FinishReason.ERROR)

    def _admissible_tokens(self) -> int:
        """Prompt tokens that waiting sequences are likely to bring into the next step."""
        batcher = self.batcher
        rows = batcher.config.max_num_sequences - len(batcher.running)
        waiting = sum(sequence.num_tokens for sequence in batcher.waiting[: min(rows, 8)])
        return min(waiting, batcher.config.max_batch_tokens)

    def _new_table(self, rows: int) -> SamplingTable:
        return SamplingTable(
            rows,
            self.engine.config.vocab_size,
            eos_token_ids=self._eos_token_ids,
            tokenizer=self.tokenizer,
            grammars=self._grammars,
        )


def _eos_token_ids(engine: DistributedInferenceEngine, tokenizer: Tokenizer) -> list[int]:
    """What the model's configuration says, else the tokenizer's."""
    if engine.config.eos_token_ids:
        return sorted(engine.config.eos_token_ids)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
