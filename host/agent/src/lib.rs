//! The shell on each host: connections, journal, timers, processes.

pub mod tunnel;
