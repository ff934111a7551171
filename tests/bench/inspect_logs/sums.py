"""Sums, judged by whether the answer has the number; questions about one number belong together."""
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums(count: int = 6):
    rows = [Sample(id=f"s{i}", input=f"{i} + 1 = ?", target=str(i + 1), metadata={"half": i // 2})
            for i in range(count)]
    return Task(dataset=rows, solver=generate(), scorer=match(location="any"), version=2,
                config=GenerateConfig(temperature=0.0, max_tokens=8))
