//! Between two agents, over their own mutual TLS connection: the words of a hand-over.

use model::order::Relay;
use serde::{Deserialize, Serialize};

/// Longest frame between agents, bytes.
pub const FRAME_BYTES_MAX: usize = 64 << 10;

/// From one agent to another, either way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "frame", rename_all = "kebab-case")]
pub enum Peer {
    /// First of all, from the one who dials.
    Hello {
        /// The oldest version of this protocol that it reads.
        version_min: u16,
        /// The newest.
        version_max: u16,
    },
    /// First of all, from the one who was dialled.
    Accepted {
        /// The version that both speak from now on.
        version: u16,
    },
    /// A word about a hand-over; the same form as when the controller relays it. The receiver takes it only when `from` is the host
    /// in the certificate of this connection and `to` is itself.
    Word(Relay),
    /// Sign of life.
    Heartbeat,
    /// A frame of a newer version, to be ignored.
    #[serde(other)]
    Other,
}
