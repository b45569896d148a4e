"""From runs to figures: out-of-fold metrics with their intervals, and the report."""
