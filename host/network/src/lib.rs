//! Bridges, taps and ports.
