"""A world with a user, who answers each turn until the model writes a number."""

from megatron_sov.judge.tools.environment import InfrastructureFault, TurnReply, World, tool


class Talking(World):
    EXAMPLES = ({"question": "A number?"},)

    def first_state(self, task):
        return {"turns": []}

    @tool
    def add(self, n: int) -> str:
        """Add.

        Args:
            n: how much.
        """
        raise AssertionError("calls are not made one by one")

    def reply(self, turn):
        if turn.content == "break":
            raise InfrastructureFault("the user is gone")
        self.state["turns"].append([turn.thoughts, turn.content, [call.name for call in turn.calls]])
        if turn.calls:
            results = tuple(f"added {call.arguments['n']}" for call in turn.calls)
            return TurnReply(results, "And?" if len(results) > 1 else None)
        return TurnReply(is_over=True) if turn.content.isdigit() else TurnReply(user=f"Not {turn.content}.")

    def score(self, answer):
        return float(len(self.state["turns"]))
