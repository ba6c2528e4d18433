"""SDFT: the model answers, and learns at each token what it would say had it seen the given answer.

    x: the row's prompt   c: its given answer   y ~ p(.|x): sampled from the model so far at every step
    s_t = p(.|x, y_<t)    q_t = teacher(.|x, c, y_<t)    (both at `temperature`)
    loss = mean over answers of mean_t D_a(s_t, q_t)   in place of the task's cross-entropy
    a = distillation_alpha:   0: KL(q || s)   1: KL(s || q), the paper's   between, with m = (1 - a) s + a q:
                              (1 - a) KL(s || m) + a KL(q || m)

distillation_mode "topk_logits" compares the student's `distillation_topk` likeliest tokens, renormalised or with one
more entry for the rest (distillation_add_tail); "full_logits" the vocabulary. Teacher: "base", "live" (the model so
far), "ema", or the path of another model. Settings and defaults are those of `trl.experimental.sdft` where they have
the same name; one step equals SDFTTrainer's for the same answers.
Differences: one answer a prompt by default, TRL draws 8; a moving average begins at the model's start, TRL's adapter
at zero; behind plain prompts, which a model without a chat template goes on with, an answer ends with its line
(`stop`), and the teacher is shown the row once before, not the paper's words; no modes with old answers or servers.
Public reproductions confirm its direction, not its size.
Cost: a generation, and a teacher's forward, a step; a copy of the base unless an adapter is trained.
Combine with: LoRA, Freeze, Replay. Do not combine with methods on the task's own answers, which are not run: DFT,
EAFT, AnchoredSFT, FINCH, MaskedThought, MFTCoder, TLTraining, KLToBase when on = "task".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from holdfast.data.asked import Asked, Reader, fits_chats
from holdfast.data.encoder import encoder_of
from holdfast.data.rendered import Rendered
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Rollouts, State, Term
from holdfast.methods.loss._divergence import forward_kl, reverse_kl
from holdfast.services import Context, View

CHAT = (  # Sec. 3 of the paper
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process:"
)
PLAIN = "{prompt}{privileged_context}\n\n{prompt}"  # ours
MODES = ("topk_logits", "full_logits")
NO_TOKENS = "it weighs the tokens of the task's own answers, which SDFT does not run."


@dataclass(frozen=True, kw_only=True)
class SDFT(Method):
    """Self-distillation fine-tuning, on policy (Shenfeld et al. 2026), arXiv 2601.19897."""

    teacher_model_kind: str = "base"  # TRL
    teacher_update_rate: float = 0.05  # TRL; of "ema"
    distillation_mode: str = "topk_logits"  # TRL
    distillation_alpha: float = 0.5  # TRL; the paper's reverse KL is 1
    distillation_topk: int = 100  # TRL
    distillation_add_tail: bool = False  # TRL
    temperature: float = 1.0  # TRL; 0: the likeliest answer, compared at 1
    top_p: float = 1.0  # TRL
    max_completion_length: int = 256  # TRL
    num_generations: int = 1  # ours: answers to each prompt
    stop: tuple[str, ...] | None = None  # ours; None: a line end where the given answers are single lines
    teacher_prompt_template: str | None = None  # None: the paper's for chats, ours for plain text

    paper: ClassVar = Paper("Self-Distillation Enables Continual Learning", "2601.19897",
                            "read in summaries; loss and defaults from trl.experimental.sdft")  # fmt: skip
    does: ClassVar = "learns from its own answers what it would say had it seen the given one"
    refuses: ClassVar = {
        **dict.fromkeys(("AnchoredSFT", "DFT", "EAFT", "MFTCoder", "TLTraining"), NO_TOKENS),
        "MaskedThought": "it masks the task's own answers, which SDFT does not run.",
        "FINCH": "it follows the loss of the task's own answers, which SDFT does not run.",
    }

    @property
    def needs(self):  # type: ignore[override]
        return frozenset({"base_logits"} if self.teacher_model_kind == "base" else ())

    def check(self, ctx: Context) -> None:
        if self.distillation_mode not in MODES:
            raise PlanError(f"SDFT.distillation_mode is {self.distillation_mode!r}.", f"Use {' or '.join(MODES)}.")
        if not 0 <= self.distillation_alpha <= 1 or not 0 <= self.teacher_update_rate <= 1 or not 0 < self.top_p <= 1:
            raise PlanError(
                "SDFT needs distillation_alpha and teacher_update_rate from 0 to 1, and top_p above 0 and at most 1.",
                "Mend them.",
            )
        if min(self.distillation_topk, self.max_completion_length, self.num_generations) < 1 or self.temperature < 0:
            raise PlanError(
                "SDFT needs distillation_topk, max_completion_length and num_generations of at least 1, and a "
                "temperature of at least 0.",
                "Mend them.",
            )
        template = self.teacher_prompt_template
        if template is not None and not ("{prompt}" in template and "{privileged_context}" in template):
            raise PlanError(
                "SDFT.teacher_prompt_template lacks {prompt} or {privileged_context}.", "Write both into it."
            )

    def rollouts(self, rows: Sequence[TokenRow], step: int, ctx: Context, state: State) -> Rollouts | None:
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        read = [reader.read(r) for r in rows if r.num_scored]
        asked = [a for a in read if a is not None]
        if len(asked) < len(read):
            raise PlanError(
                "SDFT was given a row without a prompt, or with several answers, so there is nothing to ask.",
                "Give rows of one prompt and one completion.",
            )
        shown = [self.shown(a, reader) for a in asked]
        lines = ("\n",) if all(a.one_line for a in asked) else ()
        return Rollouts(
            [a.ids for a in asked] * self.num_generations,
            shown * self.num_generations,
            teacher=self.teacher_model_kind,
            ema_rate=self.teacher_update_rate,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_completion_length,
            stop=lines if self.stop is None else self.stop,
            instead=True,
        )

    def shown(self, asked: Asked, reader: Reader) -> list[int]:
        """The teacher's prompt, which shows the given answer."""
        chat = isinstance(asked.prompt, Rendered)
        template = self.teacher_prompt_template or (CHAT if chat else PLAIN)
        text = asked.answer if chat else asked.lead + asked.answer
        ids = reader.filled(asked, template, {"privileged_context": text})
        if ids is None or (chat and not fits_chats(template)):
            raise PlanError(
                "SDFT cannot show the given answer in a chat of the data: the template must begin with {prompt} and "
                "hold it once, and the chat end with a user's turn as the chat template writes it.",
                "Mend SDFT.teacher_prompt_template, or give chats of plain turns.",
            )
        return ids

    def loss(self, view: View) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        heat = self.temperature or 1.0
        student, teacher = ((logp / heat).log_softmax(-1) for logp in (view.logp[at], view.teacher_logp(self.name)))
        if self.distillation_mode == "topk_logits":
            index = student.topk(min(self.distillation_topk, student.shape[-1]), dim=-1).indices
            student, teacher = (self._part(p.gather(-1, index)) for p in (student, teacher))
        value = divergence(student, teacher, self.distillation_alpha)
        _, place, sizes = np.unique(view.packed.row[at.cpu().numpy()], return_inverse=True, return_counts=True)
        index, count = (torch.as_tensor(a, device=value.device) for a in (place, sizes))
        return Term(value.new_zeros(len(sizes)).index_add(0, index, value) / count, self.name, per="row")

    def _part(self, logp: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of some tokens as a distribution: renormalised, or with an entry for all others."""
        mass = logp.logsumexp(-1, keepdim=True)
        if not self.distillation_add_tail:
            return logp - mass
        rest = (-mass.clamp(max=-1e-7).expm1()).log()
        return torch.cat([logp, rest], dim=-1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    """(M,) D_alpha of log-probabilities (M, K)."""
    if alpha == 0:
        return forward_kl(teacher, student)
    if alpha == 1:
        return reverse_kl(teacher, student)
    share = torch.tensor(alpha, dtype=student.dtype, device=student.device)
    mixture = torch.logaddexp(student + torch.log1p(-share), teacher + share.log())
    return (1 - alpha) * forward_kl(student, mixture) + alpha * forward_kl(teacher, mixture)
