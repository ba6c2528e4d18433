"""Answers of the base to the task's own prompts, with a verifier's word on each."""

from collections.abc import Mapping

from holdfast.data.asked import Asked, Reader
from holdfast.data.rows import Row
from holdfast.measure.verifiers import verifier
from holdfast.services import Context

Sample = tuple[str | None, float]  # the text, None for an answer without one, and its score from 0 to 1


def judged(
    asked: Mapping[bytes, Asked],
    reader: Reader,
    ctx: Context,
    rule: str,
    *,
    num: int,
    temperature: float,
    max_new_tokens: int,
    ended: bool,
    words: str,
) -> dict[bytes, list[Sample]]:
    """`num` sampled answers to each row's prompt, of one line where its own answer is one; by the rows' keys.

    rule: the verifier's name. ended: answers that were cut off have no text. words: as `Context.answers`.
    """
    judge, found = verifier(rule, ctx.base_dir), {}
    for line in (True, False):
        some = {key: a for key, a in asked.items() if a.one_line == line}
        said = ctx.answers(
            [a.ids for a in some.values()], num=num, temperature=temperature, max_new_tokens=max_new_tokens,
            stop=("\n",) if line else (), words=words,
        )  # fmt: skip
        for (key, a), answers in zip(some.items(), said, strict=True):
            texts = [reader.said(ids, a, ended) for ids in answers]
            found[key] = [(t, judge(t, a.answer, Row(a.prompt, a.answer)) if t else 0.0) for t in texts]
    return {key: found[key] for key in asked}
