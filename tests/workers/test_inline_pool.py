"""The inline pool does what every pool must, in this process."""

from pool_contract import Echo, PoolContract

from evomerge.workers.inline import InlinePool


class TestInlinePool(PoolContract):
    def make(self) -> InlinePool:
        return InlinePool(Echo())
