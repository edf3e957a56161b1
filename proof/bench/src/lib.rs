//! Side-by-side measurements: Godwit and its peers, in turn, on the same guest
//! in the same lab under the same probe.
//!
//! ```text
//!   round k:  arm 1: boot on A, calm, migrate A -> B, end
//!             arm 2: the same ...                            -> a sample each
//!   all rounds: median, worst, median of the pairwise ratios and its interval
//! ```
//!
//! Invariants:
//! - The arms are frozen: each is one small file that a reader can check, and
//!   shares with Godwit nothing but QEMU and the guest.
//! - What an arm prepares beforehand (taps, bridges, certificates) a host of
//!   that kind has anyway; starting the destination's QEMU counts.
//! - One run gives ratios. Milliseconds of two runs are never compared.

pub mod arms;
pub mod guest;
pub mod measure;
pub mod qmp;
pub mod report;
pub mod stats;
