# What: a world with tools that a model can call, a state that they change, and a goal that is checked.
# Run:  megatron-sov tools run examples/own_tool_world.py:Shop work/sft --output work/episodes
# See:  the mean reward; an episode gets 1 if its basket is what the task asks for.

from megatron_sov.judge.tools.environment import ToolRefused, World, tool


class Shop(World):
    """A shop that sells fruit until it is sold out."""

    EXAMPLES = ({"question": "Buy two apples and a pear.", "goal": {"apple": 2, "pear": 1}},)

    def first_state(self, task):
        return {"stock": {"apple": 3, "pear": 1}, "basket": {}}

    @tool
    def buy(self, fruit: str, count: int) -> str:
        """Put fruit into the basket.

        Args:
            fruit: its name.
            count: how many.
        """
        left = self.state["stock"].get(fruit, 0)
        if not 0 < count <= left:
            raise ToolRefused(f"there are {left} of {fruit}")
        self.state["stock"][fruit] = left - count
        self.state["basket"][fruit] = self.state["basket"].get(fruit, 0) + count
        return f"{count} {fruit} in the basket"

    def score(self, answer):
        return float(self.state["basket"] == self.task["goal"])
