//! What can go wrong, one enum per operation.

use std::path::PathBuf;
use std::time::Duration;

/// Why bytes from the peer are not QMP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The peer sent more than `limit` bytes without an end of line.
    #[error("a line is longer than {limit} bytes")]
    LineTooLong {
        /// The bound, in bytes.
        limit: usize,
    },
    /// An event is longer than `limit` bytes; events are queued, so they have a bound of their own.
    #[error("an event is longer than {limit} bytes")]
    EventTooLong {
        /// The bound, in bytes.
        limit: usize,
    },
    /// A line is not a QMP message.
    #[error("not a QMP message ({why}): {excerpt}")]
    Malformed {
        /// What the parser missed.
        why: String,
        /// The start of the line, made printable.
        excerpt: String,
    },
}

/// Why a session ended. The same reason is given to every command that was waiting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The peer closed the connection: QEMU ended, or was killed.
    #[error("QEMU closed the connection")]
    PeerClosed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// The peer does not speak QMP.
    #[error("the peer broke the protocol: {0}")]
    Codec(CodecError),
    /// An answer to no question, or an error that belongs to no command.
    #[error("the peer broke the protocol: {0}")]
    OutOfStep(String),
    /// The reader of the events fell behind and an essential event would have been lost.
    #[error("{bound} events wait unread: reconnect and ask for the state")]
    EventOverflow {
        /// The bound of the event queue.
        bound: usize,
    },
    /// Every handle of the session was dropped.
    #[error("the session was closed here")]
    Released,
}

/// Why no session could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket does not exist or does not accept.
    #[error("cannot connect to the QMP socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The socket accepted but did not greet in time: QEMU serves one client a socket.
    #[error("no QMP greeting within {0:?}: QEMU hangs, or another session holds the socket")]
    NoGreeting(Duration),
    /// The connection ended before the session was ready.
    #[error("the QMP greeting failed: {0}")]
    Closed(CloseReason),
    /// QEMU refused to leave negotiation mode.
    #[error("QEMU refused the capabilities: {0}")]
    Refused(Box<CommandError>),
}

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// QEMU answered with an error: nothing was done, as far as QEMU's documentation promises that.
    #[error("QEMU refused `{command}`: {desc}")]
    Refused {
        /// The command's QMP name.
        command: String,
        /// QEMU's error class; `GenericError` for most, `CommandNotFound` for a command that this QEMU lacks.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// No answer came in time. The command may still take effect.
    #[error("QEMU did not answer `{command}` within {after:?}")]
    Deadline {
        /// The command's QMP name.
        command: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// The session ended first. The command may have taken effect.
    #[error("`{command}` has no answer: {reason}")]
    Closed {
        /// The command's QMP name.
        command: String,
        /// Why the session ended.
        reason: CloseReason,
    },
    /// QEMU's answer does not have the documented shape.
    #[error("QEMU's answer to `{command}` has an unexpected shape")]
    Answer {
        /// The command's QMP name.
        command: String,
        /// What the decoder missed.
        source: serde_json::Error,
    },
    /// The arguments cannot be sent.
    #[error("`{command}` cannot be encoded: {why}")]
    Encode {
        /// The command's QMP name.
        command: String,
        /// Why.
        why: String,
    },
}

impl CommandError {
    /// True when QEMU itself answered, with an error.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}
