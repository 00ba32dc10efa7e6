"""SequenceTable and TokenBatch: persistent arrays, one fixed row per running sequence, and a step gathered from them.

A row is written when its sequence is admitted and then only appended to, so building a step is a few vectorised gathers
whatever the batch. Arrays are numpy on the host; the engine turns a TokenBatch into tensors on its device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock_core.batching.sequence import SequenceState

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class TokenBatch:
    """One step: which sequences, how many tokens of each, where their keys and values go.

    T tokens of N sequences, of which R positions are sampled. Sequence i computes `query_lens[i]` tokens from its
    `num_computed` on, and is sampled at its last `num_samples[i]` positions: none for a chunk that does not reach the
    sequence's end, one for a decode, one more for each draft to check.

    Attributes:
        token_ids, positions, slot_mapping: int64 [T].
        query_start: int32 [N + 1]. seq_lens: int32 [N]. block_table: int32 [N, P].
        logit_rows: int64 [R], places in the flattened batch whose logits are wanted.
        sample_rows: int64 [R], rows of the persistent arrays. output_positions: int64 [R], index of the output token.
        drafts: int64 [R], the draft that each sampled position's context ends with, -1 for none; None: no drafts.
        carried: where tokens stand in `token_ids` that the step before has chosen and nobody has read, and their places
            among that step's R: int64 [2, C]. None: there are none.
        launched: the batcher counts on it as computed already.
        offloads, restores, copies: before the forward pass, and in this order, pages (from, to) that move to host
            memory, that come back, and that are copied within the device.
        admitted: sequences that got a row for this step. vacated: rows given up since the last step.
    """

    sequences: list[SequenceState]
    query_lens: list[int]
    num_samples: list[int]
    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    query_start: Int32
    seq_lens: Int32
    block_table: Int32
    max_query_len: int
    max_seq_len: int
    logit_rows: Int64
    sample_rows: Int64
    output_positions: Int64
    drafts: Int64 | None = None
    carried: Int64 | None = None
    launched: bool = False
    offloads: list[tuple[int, int]] = field(default_factory=list)
    restores: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[SequenceState] = field(default_factory=list)
    vacated: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


class SequenceTable:
    """Token ids and block tables of the running sequences, one fixed row each.

    Attributes:
        token_ids: int32 [max_num_sequences, max_model_len], prompt, output and drafts.
        block_table: int32 [max_num_sequences, max_pages].
    """

    def __init__(self, max_num_sequences: int, max_model_len: int, page_size: int) -> None:
        self.page_size = page_size
        self.token_ids: Int32 = np.zeros((max_num_sequences, max_model_len), dtype=np.int32)
        self.block_table: Int32 = np.zeros((max_num_sequences, -(-max_model_len // page_size)), dtype=np.int32)

    def load(self, sequence: SequenceState) -> None:
        """Write an admitted sequence's tokens and pages into its row."""
        row, prompt, output = sequence.row, sequence.num_prompt, sequence.output_ids
        tokens = self.token_ids[row]
        tokens[:prompt] = sequence.prompt_ids
        if output:
            tokens[prompt : prompt + len(output)] = output
        self.block_table[row, : len(sequence.pages)] = sequence.pages

    def extend_pages(self, sequence: SequenceState, pages: list[int]) -> None:
        """Append pages to a running sequence."""
        first = len(sequence.pages)
        sequence.pages += pages
        self.block_table[sequence.row, first : first + len(pages)] = pages

    def gather(self, sequences: list[SequenceState], query_lens: list[int]) -> TokenBatch:
        """Build the step's arrays. Drafts that are part of a query are written behind the sequence's tokens first."""
        count = len(sequences)
        rows = np.fromiter([s.row for s in sequences], np.int64, count)
        starts = np.fromiter([s.num_computed for s in sequences], np.int64, count)
        lengths = np.fromiter(query_lens, np.int64, count)
        ends = starts + lengths
        num_samples, outputs = [], []
        for sequence, query_len in zip(sequences, query_lens, strict=True):
            known = sequence.num_tokens
            beyond = sequence.num_computed + query_len - known
            if beyond > 0:
                self.token_ids[sequence.row, known : known + beyond] = sequence.draft_ids[:beyond]
            num_samples.append(max(0, beyond + 1))
            outputs.append(len(sequence.output_ids) + sequence.pending)

        longest = max(query_lens)
        query_start = np.zeros(count + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        width = -(-int(ends.max()) // self.page_size)
        if longest == 1:
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, lengths)
            positions = np.arange(query_start[-1], dtype=np.int64) + np.repeat(starts - query_start[:-1], lengths)
        pages = self.block_table[token_rows, positions // self.page_size].astype(np.int64)
        token_ids = self.token_ids[token_rows, positions].astype(np.int64)
        drafts = None
        if max(num_samples) <= 1:
            sampled = np.fromiter(num_samples, np.bool_, count)
            logit_rows = query_start[1:][sampled].astype(np.int64) - 1
            sample_rows = rows[sampled]
            output_positions = np.fromiter(outputs, np.int64, count)[sampled]
        else:
            samples = np.fromiter(num_samples, np.int64, count)
            within = np.arange(samples.sum(), dtype=np.int64) - np.repeat(np.cumsum(samples) - samples, samples)
            logit_rows = np.repeat(query_start[1:] - samples, samples) + within
            sample_rows = np.repeat(rows, samples)
            output_positions = np.repeat(np.fromiter(outputs, np.int64, count), samples) + within
            drafts = np.where(within > 0, token_ids[logit_rows], -1)
        return TokenBatch(
            sequences=sequences,
            query_lens=query_lens,
            num_samples=num_samples,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=pages * self.page_size + positions % self.page_size,
            query_start=query_start,
            seq_lens=ends.astype(np.int32),
            block_table=self.block_table[rows, :width],
            max_query_len=longest,
            max_seq_len=int(ends.max()),
            logit_rows=logit_rows,
            sample_rows=sample_rows,
            output_positions=output_positions,
            drafts=drafts,
        )

    def append(self, rows: list[int], columns: list[int], tokens: list[int]) -> None:
        """Write chosen tokens behind their sequences: element i goes to [rows[i], columns[i]]."""
        self.token_ids[rows, columns] = tokens
