//! Server-sent events, read piece by piece (WHATWG HTML, 9.2.6).

use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::exit::{Exit, Failure, chain};

/// Longest event, bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// An event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its kind.
    pub(crate) name: String,
    /// Its data.
    pub(crate) data: String,
    /// Its id, if it has one.
    pub(crate) id: Option<String>,
}

/// A stream of events.
pub(crate) struct Events {
    body: Incoming,
    parser: Parser,
}

#[derive(Default)]
struct Parser {
    bytes: Vec<u8>,
}

impl Events {
    pub(crate) fn new(body: Incoming) -> Self {
        Self {
            body,
            parser: Parser::default(),
        }
    }

    /// The next event; `None` when the server ends the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.parser.next() {
                return Ok(Some(event));
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let broken = |why: String| Failure::new(Exit::Unreachable, format!("the stream of events broke: {why}"));
            let frame = frame.map_err(|error| broken(chain(&error)))?;
            if let Ok(piece) = frame.into_data() {
                self.parser.bytes.extend_from_slice(&piece);
            }
            if self.parser.bytes.len() > EVENT_BYTES_MAX {
                return Err(broken("an event is too long".to_owned()));
            }
        }
    }
}

impl Parser {
    /// The next whole event; comments are passed over.
    fn next(&mut self) -> Option<Event> {
        loop {
            let end = self.bytes.windows(2).position(|pair| pair == b"\n\n")?;
            let block: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let event = parse(&String::from_utf8_lossy(&block));
            if event != Event::default() {
                return Some(event);
            }
        }
    }
}

fn parse(block: &str) -> Event {
    let mut event = Event::default();
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut event.name),
            "id" => event.id = Some(value.to_owned()),
            "data" if event.data.is_empty() => value.clone_into(&mut event.data),
            "data" => event.data = format!("{}\n{value}", event.data),
            _ => {}
        }
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_they_are_cut_and_comments_are_not_events() {
        let text = b": hello\n\nevent: notice\nid: 7\ndata: {\"a\":1}\n\n:\n\nevent: progress\ndata: {}\n\n";
        for cut in 1..text.len() {
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for piece in text.chunks(cut) {
                parser.bytes.extend_from_slice(piece);
                events.extend(std::iter::from_fn(|| parser.next()));
            }
            assert_eq!(events.len(), 2, "{cut}");
            assert_eq!(
                (events[0].name.as_str(), events[0].id.as_deref()),
                ("notice", Some("7"))
            );
            assert_eq!((events[1].name.as_str(), events[1].data.as_str()), ("progress", "{}"));
        }
    }
}
