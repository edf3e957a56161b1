//! The simulator: the same engine, tasks and hand-over under a simulated clock.
