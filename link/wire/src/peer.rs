//! Between two agents, over their own mutual TLS connection: the words of a hand-over, what the guest missed in it, and blobs lent.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use model::{
    Digest, Generation, PortId, VmId,
    order::Relay,
    policy::{Flow, Traffic},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Longest frame between agents, bytes: a guest's frame of 64 KiB in base 64 and its envelope.
pub const FRAME_BYTES_MAX: usize = 128 << 10;

/// Bytes of guests' frames, before base 64, that fit in one [`Peer::Missed`] however short each of them is.
pub const MISSED_BYTES_MAX: usize = 66 << 10;

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
    /// What a guest missed while it stood for a move, from the host that it left; the receiver takes it only from the source of the
    /// hand-over by which it has the VM. Best effort: not answered, not said again, not relayed.
    Missed(Missed),
    /// What was under way at a guest's port on the host that it leaves, said before the guest stands and once more when it runs on; the
    /// receiver takes it only from the source of its hand-over. Best effort, as [`Peer::Missed`].
    Port(PortState),
    /// First of all, instead of [`Peer::Hello`]: a connection for one blob, that the controller had the other host lend to this one.
    /// Answered by [`Peer::Lent`] and then the blob's bytes from `from_bytes` to its end, without frames; or by [`Peer::NotLent`].
    Borrow {
        /// The oldest version of this protocol that it reads.
        version_min: u16,
        /// The newest.
        version_max: u16,
        /// The blob.
        digest: Digest,
        /// How many of its bytes are there already, after a connection that was cut.
        from_bytes: u64,
    },
    /// The blob's bytes follow.
    Lent {
        /// How many it has in all.
        size_bytes: u64,
    },
    /// They do not: it was not told to lend that blob to this host, or cannot. Which of the two is not told to whom it was not.
    NotLent {
        /// Why, for people.
        reason: String,
    },
    /// Sign of life.
    Heartbeat,
    /// A frame of a newer version, to be ignored.
    #[serde(other)]
    Other,
}

/// Most flows in one [`PortState`].
pub const FLOWS_MAX: usize = 512;

/// What a port has of its guest, which goes where the guest goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The VM.
    pub vm: VmId,
    /// Names the hand-over.
    pub granted: Generation,
    /// The port.
    pub port: PortId,
    /// What its rules let go on; at most [`FLOWS_MAX`].
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// What went through it in all, once the guest stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
}

/// Frames that reached a VM's port on the host that it left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missed {
    /// The VM.
    pub vm: VmId,
    /// The generation under which the receiver has it: names the hand-over.
    pub granted: Generation,
    /// The port that they are for.
    pub port: PortId,
    /// In the order in which they came; at most [`MISSED_BYTES_MAX`] together.
    pub frames: Vec<GuestFrame>,
}

/// One frame to a guest: 10 bytes of `virtio_net_hdr` (virtio 1.2, section 5.1.6, little-endian, without `num_buffers`) and the
/// Ethernet frame. In JSON it is text in base 64.
#[derive(Clone, PartialEq, Eq)]
pub struct GuestFrame(pub Vec<u8>);

impl fmt::Debug for GuestFrame {
    /// Its length: what guests are sent is in no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestFrame({} bytes)", self.0.len())
    }
}

impl Serialize for GuestFrame {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for GuestFrame {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{decode, encode};

    #[test]
    fn as_many_bytes_as_are_allowed_fit_in_a_frame_whether_in_one_piece_or_in_the_shortest() {
        // The shortest that a bridge sends out: the virtio header and an Ethernet header.
        for length in [24, 70, 1524, MISSED_BYTES_MAX] {
            let missed = Peer::Missed(Missed {
                vm: VmId(uuid::Uuid::max()),
                granted: Generation(u64::MAX),
                port: PortId(uuid::Uuid::max()),
                frames: vec![GuestFrame(vec![0xff; length]); MISSED_BYTES_MAX / length],
            });
            let bytes = encode(&missed, FRAME_BYTES_MAX).unwrap();
            assert_eq!(decode::<Peer>(&bytes[4..]).unwrap(), missed);
        }
    }

    #[test]
    fn as_many_flows_as_are_allowed_fit_in_a_frame() {
        let flow = Flow {
            remote: "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(),
            protocol: u8::MAX,
            guest_port: u16::MAX,
            remote_port: u16::MAX,
            ending: false,
            expires_s: u32::MAX,
        };
        let state = Peer::Port(PortState {
            vm: VmId(uuid::Uuid::max()),
            granted: Generation(u64::MAX),
            port: PortId(uuid::Uuid::max()),
            flows: vec![flow; FLOWS_MAX],
            traffic: Some(Traffic::default()),
        });
        let bytes = encode(&state, FRAME_BYTES_MAX).unwrap();
        assert_eq!(decode::<Peer>(&bytes[4..]).unwrap(), state);
    }

    #[test]
    fn what_is_not_base_64_is_refused_and_a_frames_content_is_in_no_log() {
        assert!(decode::<GuestFrame>(br#""?""#).is_err());
        let shown = format!("{:?}", GuestFrame(b"hunter2".to_vec()));
        assert_eq!(shown, "GuestFrame(7 bytes)");
    }
}
