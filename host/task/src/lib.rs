//! One VM on one host, as a pure state machine.
