# What: a tool environment: tools that a model calls, the state that they change, and a reward for the goal.
# Run:  megatron-sov tools run examples/own_tool_world.py:Shop work/sft --output work/episodes
# See:  the mean reward; an episode gets 1 if its basket equals the goal of the task.

from megatron_sov.judge.tools.environment import ToolRefused, World, tool


class Shop(World):
    """A shop with a limited stock of fruit."""

    EXAMPLES = ({"question": "Buy two apples and a pear.", "goal": {"apple": 2, "pear": 1}},)

    def first_state(self, task):
        return {"stock": {"apple": 3, "pear": 1}, "basket": {}}

    @tool
    def buy(self, fruit: str, count: int) -> str:
        """Put fruit into the basket.

        Args:
            fruit: name of the fruit.
            count: number of pieces.
        """
        stock = self.state["stock"].get(fruit, 0)
        if not 0 < count <= stock:
            raise ToolRefused(f"{fruit}: {stock} in stock")
        self.state["stock"][fruit] = stock - count
        self.state["basket"][fruit] = self.state["basket"].get(fruit, 0) + count
        return f"{count} {fruit} in the basket"

    def score(self, answer):
        return float(self.state["basket"] == self.task["goal"])
