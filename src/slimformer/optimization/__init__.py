"""The fastest combination of methods within a loss: costs and losses measured, proposals by a programme, judged."""
