"""Few-shot examples that never contain the item they precede.

lm-eval 0.4.13 removes the item from its examples only if the task names its test split as
`fewshot_split`. A task that has nothing but a test split draws its examples there too, and some
prompts then hold their own answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sov.base.errors import UserError


def exclude_item_from_examples(name: str, task: Any) -> None:
    """Make an lm-eval task draw other examples in place of those that equal the evaluated item.

    Args:
        name: of the task, for messages.
        task: an lm-eval task; changed in place. Draws that do not contain the item stay as lm-eval makes
            them.
    """
    sampler = getattr(task, "sampler", None)
    if sampler is None:  # tasks that are code build their prompts themselves
        return
    config = task.fewshot_cfg
    draws_from_rows = config.split is None and config.samples is None
    if draws_from_rows and not (task.has_training_docs() or task.has_validation_docs()):
        config.split = task.config.test_split  # lm-eval now removes the item itself
    examples = _OtherExamples(name, task, sampler)
    task.sampler = examples
    build_context = task.fewshot_context

    def build_context_of_item(doc: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        examples.item = doc
        return build_context(doc, *args, **kwargs)

    task.fewshot_context = build_context_of_item


class _OtherExamples:
    """Stands in front of lm-eval's sampler and replaces drawn examples that equal the item."""

    def __init__(self, name: str, task: Any, sampler: Any) -> None:
        self._name, self._task, self._sampler = name, task, sampler
        self.item: Mapping[str, Any] = {}
        """The item whose prompt is built."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, n: int, **kwargs: Any) -> Sequence[Any]:
        """Return `n` examples, none of which is the item.

        Raises:
            UserError: there are fewer than `n` other examples.
        """
        if n >= (available := len(self._sampler.fewshot_docs())) and kwargs.get("eval_doc") is not None:
            raise self._too_few(n, available - 1)
        if n > available:
            raise self._too_few(n, available)
        drawn = list(self._sampler.sample(n=n, **kwargs))
        kept = [example for example in drawn if not self._is_item(example)]
        if len(kept) == n:
            return drawn
        for candidate in self._candidates():
            if candidate not in kept and not self._is_item(candidate):
                kept.append(candidate)
            if len(kept) == n:
                return kept
        raise self._too_few(n, len(kept))

    def _candidates(self) -> Sequence[Any]:
        from lm_eval.api.samplers import FirstNSampler

        pool = list(self._sampler.fewshot_docs())
        return pool if isinstance(self._sampler, FirstNSampler) else self._sampler.rnd.sample(pool, len(pool))

    def _is_item(self, example: Any) -> bool:
        """Return whether an example has the fields of the item, or its question with the same answer."""
        if example == self.item:
            return True
        question = self._task.doc_to_text(self.item)
        if not isinstance(question, str) or not question.strip():  # the index of a choice, or no text
            return False
        return (self._task.doc_to_text(example, self._task.fewshot_cfg.doc_to_text) == question
                and self._task.doc_to_target(example, self._task.fewshot_cfg.doc_to_target)
                == self._task.doc_to_target(self.item))

    def _too_few(self, asked: int, available: int) -> UserError:
        return UserError(f"task {self._name}: {asked} examples are wanted in front of each item, and its "
                         f"examples hold {available} that are not the item itself; pass a smaller "
                         "--num-fewshot, or give the task a fewshot_split of its own")
