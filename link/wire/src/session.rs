//! The session of an agent with the controller: hello, numbered reports up, orders down, heartbeats, consoles.
//!
//! ```text
//!   agent                                     controller
//!     │ Hello {versions, incarnation, ...} ──────▶ │
//!     │ ◀──────────── Accepted {version, received} │   all up to `received` of this incarnation is committed
//!     │ Report {sequence: received + 1, ...} ────▶ │   again, if it was sent before
//!     │ ◀──────────────────────── Order {order}    │   first every order of the outbox, then new ones
//!     │ ◀──────────────────────── Ack {sequence}   │   after the commit that covers it: forget it
//!     │ Progress, Telemetry, Heartbeat ──────────▶ │   not numbered
//!     │ ◀───────────────────── Heartbeat, Close    │
//! ```
//!
//! Orders have no numbers here: the outbox keeps each until a report answers it, and a repeated one is answered from the
//! agent's journal by its revision. A second acknowledgement would be a second truth.

use std::time::Duration;

use model::{
    Epoch, Generation, OperationId, Order, PortId, Refusal, Report, Telemetry, VmId, id::Sequence, operation::Progress,
    policy::Traffic,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Ticket;

/// Where an agent opens its session.
pub const SESSION_PATH: &str = "/agent/v1/session";

/// Under this an agent fetches a blob: `/agent/v1/blobs/{digest}`.
pub const BLOBS_PATH: &str = "/agent/v1/blobs";

/// Under this an agent answers [`Down::OpenConsole`]: `/agent/v1/console/{id}`, its request body is what the guest prints, the
/// response body what people type.
pub const CONSOLE_PATH: &str = "/agent/v1/console";

/// Where an agent has its certificate renewed.
pub const RENEW_PATH: &str = "/agent/v1/renew";

/// The header that carries [`Down::OpenConsole`]'s ticket.
pub const TICKET_HEADER: &str = "godwit-ticket";

/// Longest frame of a session, bytes.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Each side sends something at least this often.
pub const HEARTBEAT: Duration = Duration::from_secs(2);

/// After this long without a byte the other side is lost.
pub const LOST_AFTER: Duration = Duration::from_secs(10);

/// Most ports in one [`Up::Ports`].
pub const PORTS_MAX: usize = 1000;

/// What went through a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortTraffic {
    /// The port.
    pub port: PortId,
    /// Since its VM was started, on all hosts together.
    pub traffic: Traffic,
}

/// The agent's first frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version of this protocol that the agent reads.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// The agent's build, for people.
    pub build: String,
    /// Names this run of the agent; its reports are numbered from 1 on in each.
    pub incarnation: Uuid,
    /// The last of its reports that was acknowledged, 0 for none. The next that it sends follows [`Accepted::received`].
    pub acknowledged: Sequence,
    /// The highest leader's epoch that the agent has seen. It obeys no lower one.
    pub epoch: Epoch,
}

/// The controller's first frame: the session stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The version that both speak from now on.
    pub version: u16,
    /// The controller's build, for people.
    pub build: String,
    /// This leader's epoch.
    pub epoch: Epoch,
    /// The last report of this incarnation that is committed; not below the agent's `acknowledged`.
    pub received: Sequence,
}

/// From agent to controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "frame", rename_all = "kebab-case")]
pub enum Up {
    /// First of all.
    Hello(Hello),
    /// A report, kept by the agent until it is acknowledged.
    Report {
        /// One more than that of the report before.
        sequence: Sequence,
        /// The report. Never [`Report::Progress`], which has its own frame.
        report: Report,
    },
    /// Telemetry: not numbered, not resent.
    Progress {
        /// The operation.
        operation: OperationId,
        /// How far.
        progress: Progress,
    },
    /// Telemetry: what the host and its VMs use. Not numbered, not resent; older controllers ignore it.
    Telemetry {
        /// The look.
        telemetry: Box<Telemetry>,
    },
    /// What went through ports of the host until now. Telemetry, as well.
    Ports {
        /// Each once, at most [`PORTS_MAX`].
        ports: Vec<PortTraffic>,
    },
    /// A console that was asked for cannot be opened.
    ConsoleRefused {
        /// As in [`Down::OpenConsole`].
        console: Uuid,
        /// Why.
        reason: Refusal,
    },
    /// Sign of life.
    Heartbeat,
    /// The agent ends the session.
    Close {
        /// Why.
        reason: Refusal,
    },
    /// A frame of a newer version, to be ignored.
    #[serde(other)]
    Other,
}

/// From controller to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "frame", rename_all = "kebab-case")]
pub enum Down {
    /// First of all.
    Accepted(Accepted),
    /// What to do. It may come again.
    Order {
        /// The order.
        order: Order,
    },
    /// All reports up to this one are committed; the agent forgets them.
    Ack {
        /// The last.
        sequence: Sequence,
    },
    /// Open a VM's serial console: a `POST` to [`CONSOLE_PATH`] with the ticket in [`TICKET_HEADER`].
    OpenConsole {
        /// Names this console.
        console: Uuid,
        /// The VM.
        vm: VmId,
        /// Under which generation it is thought to be there.
        generation: Generation,
        /// Allows one `POST`, within [`CONSOLE_TICKET_VALID`].
        ticket: Ticket,
    },
    /// Sign of life.
    Heartbeat,
    /// The controller ends the session.
    Close {
        /// Why, and when to come back.
        reason: Refusal,
    },
    /// A frame of a newer version, to be ignored.
    #[serde(other)]
    Other,
}

/// How long a console's ticket is valid.
pub const CONSOLE_TICKET_VALID: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{decode, encode};

    #[test]
    fn a_ticket_is_not_shown_by_debug() {
        let frame = Down::OpenConsole {
            console: Uuid::nil(),
            vm: VmId(Uuid::nil()),
            generation: Generation(1),
            ticket: Ticket::new("hunter2"),
        };
        assert!(!format!("{frame:?}").contains("hunter2"));
        let bytes = encode(&frame, FRAME_BYTES_MAX).unwrap();
        assert_eq!(decode::<Down>(&bytes[4..]).unwrap(), frame);
    }

    #[test]
    fn an_unknown_frame_is_other_an_unknown_field_is_ignored_and_an_unknown_order_is_an_error() {
        let up = br#"{"frame":"from-the-future","x":[1,{"y":2}]}"#;
        assert_eq!(decode::<Up>(up).unwrap(), Up::Other);
        assert_eq!(
            decode::<Up>(br#"{"frame":"heartbeat","mood":"good"}"#).unwrap(),
            Up::Heartbeat
        );
        let down = br#"{"frame":"order","order":{"order":"from-the-future"}}"#;
        let error = decode::<Down>(down).unwrap_err();
        assert!(std::error::Error::source(&error).is_some_and(|s| s.to_string().contains("from-the-future")));
    }
}
