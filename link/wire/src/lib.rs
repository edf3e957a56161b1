//! The serialised forms between processes: their envelopes, versions, bounds and framing. No input or output happens here.
//!
//! ```text
//!   agent ── POST /agent/v1/session, request body ──▶ controller     session::Up    in frames
//!   agent ◀──────────────── its response body ─────── controller     session::Down  in frames
//!   agent ◀───────── mutual TLS between hosts ───────▶ agent          peer::Peer     in frames
//!   new host, tools ── JSON over HTTPS ──────────────▶ controller     join::*, problem::Problem
//!
//!   frame = length (4 bytes, big-endian, of what follows) and that many bytes of JSON
//! ```
//!
//! Invariants:
//! - What travels is the model's own serialised form. Only envelopes are defined here: there is no twin of a noun to copy.
//! - Additive: readers ignore unknown fields and default missing ones; an unknown kind of frame is read as `Other` and ignored;
//!   an unknown kind of payload is an error that ends the session with a reason.
//! - Everything is bounded before memory is taken for it: a frame by its announced length, JSON by depth (128).
//! - Every message of every released version has committed sample bytes that are read in a test.

pub mod frame;
pub mod join;
pub mod peer;
pub mod problem;
pub mod session;
pub mod ticket;

pub use frame::{Decoder, FrameError, decode, encode};
pub use join::{JoinRequest, JoinResponse, RenewRequest, RenewResponse};
pub use peer::{GuestFrame, Missed, Peer, PortState};
pub use problem::Problem;
pub use session::{Accepted, Down, Hello, PortTraffic, Up};
pub use ticket::Ticket;

/// The oldest version of these forms that this build reads.
pub const VERSION_MIN: u16 = 1;

/// The newest version of these forms that this build reads and writes.
pub const VERSION_MAX: u16 = 1;

/// The version that two builds speak: the newest that both know. `None` when there is none.
#[must_use]
pub fn negotiate(theirs_min: u16, theirs_max: u16) -> Option<u16> {
    let version = VERSION_MAX.min(theirs_max);
    (version >= VERSION_MIN && version >= theirs_min).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_builds_speak_the_newest_version_that_both_know_or_none() {
        assert_eq!(negotiate(VERSION_MIN, VERSION_MAX), Some(VERSION_MAX));
        assert_eq!(negotiate(VERSION_MIN, VERSION_MAX + 3), Some(VERSION_MAX));
        assert_eq!(negotiate(VERSION_MAX + 1, VERSION_MAX + 3), None);
        assert_eq!(negotiate(0, VERSION_MIN - 1), None);
        assert_eq!(negotiate(5, 2), None);
    }
}
