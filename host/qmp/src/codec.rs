//! Bytes to QMP messages and back. No input and output here, so that it can be tested with any bytes.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::Version;
use crate::error::CodecError;
use crate::event::Event;

/// How much of a bad line an error shows.
const EXCERPT_BYTES: usize = 80;

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first line of a connection.
    Greeting {
        /// QEMU's version.
        version: Version,
        /// Protocol capabilities on offer; `oob` is the only one so far.
        capabilities: Vec<String>,
    },
    /// A command succeeded.
    Return {
        /// The command's id.
        id: u64,
        /// Its result.
        value: Value,
    },
    /// A command failed, or (without id) a line could not be read.
    Error {
        /// The command's id.
        id: Option<u64>,
        /// Error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// Something happened.
    Event(Event),
}

/// One command line to QEMU.
#[derive(Debug, Serialize)]
pub struct Request<'a, A> {
    /// In-band command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execute: Option<&'a str>,
    /// Out-of-band command: QEMU runs it even while its main loop is stuck.
    #[serde(rename = "exec-oob", skip_serializing_if = "Option::is_none")]
    pub exec_oob: Option<&'a str>,
    /// Arguments: an object.
    pub arguments: A,
    /// Echoed in the answer.
    pub id: u64,
}

impl<A: Serialize> Request<'_, A> {
    /// The line, with its end.
    ///
    /// # Errors
    /// When the arguments have no JSON form.
    pub fn to_line(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// Collects bytes and gives messages. Holds at most one bounded line plus what was pushed last.
#[derive(Debug)]
pub struct Codec {
    buffer: Vec<u8>,
    /// Bytes of `buffer` already known to hold no end of line, so that each byte is looked at once.
    scanned: usize,
    line_bytes_max: usize,
    event_bytes_max: usize,
}

impl Codec {
    /// A codec that refuses lines and events longer than these many bytes.
    #[must_use]
    pub fn new(line_bytes_max: usize, event_bytes_max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            scanned: 0,
            line_bytes_max,
            event_bytes_max,
        }
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. After an error the codec is of no more use: the stream has no way back.
    ///
    /// # Errors
    /// When a line is too long or is no QMP message.
    pub fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        loop {
            let Some(end) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') else {
                self.scanned = self.buffer.len();
                return if self.scanned > self.line_bytes_max {
                    Err(self.too_long())
                } else {
                    Ok(None)
                };
            };
            let end = self.scanned + end;
            if end > self.line_bytes_max {
                return Err(self.too_long());
            }
            let message = parse(self.buffer[..end].trim_ascii(), self.event_bytes_max);
            self.buffer.drain(..=end);
            self.scanned = 0;
            if let Some(message) = message? {
                return Ok(Some(message));
            }
        }
    }

    fn too_long(&self) -> CodecError {
        CodecError::LineTooLong {
            limit: self.line_bytes_max,
        }
    }
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(default, deserialize_with = "present")]
    r#return: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    timestamp: crate::event::Timestamp,
    id: Option<u64>,
}

/// `"return": null` is a return, unlike an absent one.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Greeting {
    version: Version,
    capabilities: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Refusal {
    class: String,
    desc: String,
}

/// An empty line is nothing; QMP allows white space between messages.
fn parse(line: &[u8], event_bytes_max: usize) -> Result<Option<Message>, CodecError> {
    if line.is_empty() {
        return Ok(None);
    }
    let parsed: Line = serde_json::from_slice(line).map_err(|error| malformed(line, &error.to_string()))?;
    let message = match parsed {
        Line { event: Some(_), .. } if line.len() > event_bytes_max => {
            return Err(CodecError::EventTooLong { limit: event_bytes_max });
        }
        Line {
            event: Some(name),
            data,
            timestamp,
            ..
        } => Message::Event(Event::new(&name, data, timestamp)),
        Line {
            error: Some(Refusal { class, desc }),
            id,
            ..
        } => Message::Error { id, class, desc },
        Line {
            r#return: Some(value),
            id: Some(id),
            ..
        } => Message::Return { id, value },
        Line {
            greeting: Some(Greeting { version, capabilities }),
            ..
        } => Message::Greeting { version, capabilities },
        Line { .. } => return Err(malformed(line, "neither greeting, return, error nor event")),
    };
    Ok(Some(message))
}

fn malformed(line: &[u8], why: &str) -> CodecError {
    let excerpt = line[..line.len().min(EXCERPT_BYTES)].escape_ascii().to_string();
    CodecError::Malformed {
        why: why.to_owned(),
        excerpt,
    }
}
