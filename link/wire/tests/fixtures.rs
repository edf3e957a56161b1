//! The promise to older and newer builds: the committed bytes of every released version are read as what they meant.
//!
//! `GODWIT_NEW_FIXTURES=1 cargo test -p wire --test fixtures` writes those that are missing. One that is there is never
//! overwritten: other builds send such bytes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod samples;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use wire::{Down, Peer, Up};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1")
}

/// Whether all that `old` says is said by `new`, which may say more.
fn says_all(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => old
            .iter()
            .all(|(key, value)| new.get(key).is_some_and(|n| says_all(value, n))),
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| says_all(old, new))
        }
        _ => old == new,
    }
}

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(kind: &str, name: &str, sample: &T) {
    let path = folder().join(format!("{kind}-{name}.json"));
    if !path.exists() && std::env::var_os("GODWIT_NEW_FIXTURES").is_some() {
        fs::create_dir_all(folder()).unwrap();
        let text = serde_json::to_string_pretty(sample).unwrap();
        fs::write(&path, text + "\n").unwrap();
    }
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let read: T = wire::decode(&bytes).unwrap_or_else(|error| panic!("{}: {error:?}", path.display()));
    assert_eq!(&read, sample, "{}", path.display());
    let old: Value = serde_json::from_slice(&bytes).unwrap();
    let new = serde_json::to_value(&read).unwrap();
    assert!(says_all(&old, &new), "{}: {old} became {new}", path.display());
}

#[test]
fn every_message_of_version_1_is_still_read_as_what_it_meant() {
    samples::ups().iter().for_each(|(name, up)| check("up", name, up));
    samples::downs()
        .iter()
        .for_each(|(name, down)| check("down", name, down));
    samples::peers()
        .iter()
        .for_each(|(name, peer)| check("peer", name, peer));
    check("join", "request", &samples::join_request());
    check("join", "response", &samples::join_response());
    check("renew", "request", &samples::renew_request());
    check("renew", "response", &samples::renew_response());
    check("problem", "full", &samples::problem());
}

#[test]
fn no_committed_bytes_are_left_unread() {
    let count = samples::ups().len() + samples::downs().len() + samples::peers().len() + 5;
    assert_eq!(fs::read_dir(folder()).unwrap().count(), count);
}

/// A new variant does not compile here until it is given a name, and fails until it has a sample.
#[test]
fn every_kind_of_frame_has_a_sample() {
    fn up(frame: &Up) -> &'static str {
        match frame {
            Up::Hello(_) => "hello",
            Up::Report { .. } => "report",
            Up::Progress { .. } => "progress",
            Up::Telemetry { .. } => "telemetry",
            Up::ConsoleRefused { .. } => "console-refused",
            Up::Heartbeat => "heartbeat",
            Up::Ports { .. } => "ports",
            Up::Close { .. } => "close",
            Up::Other => "other",
        }
    }
    fn down(frame: &Down) -> &'static str {
        match frame {
            Down::Accepted(_) => "accepted",
            Down::Order { .. } => "order",
            Down::Ack { .. } => "ack",
            Down::OpenConsole { .. } => "open-console",
            Down::Heartbeat => "heartbeat",
            Down::Close { .. } => "close",
            Down::Other => "other",
        }
    }
    fn peer(frame: &Peer) -> &'static str {
        match frame {
            Peer::Hello { .. } => "hello",
            Peer::Accepted { .. } => "accepted",
            Peer::Word(_) => "word",
            Peer::Missed(_) => "missed",
            Peer::Port(_) => "port",
            Peer::Borrow { .. } => "borrow",
            Peer::Lent { .. } => "lent",
            Peer::NotLent { .. } => "not-lent",
            Peer::Heartbeat => "heartbeat",
            Peer::Other => "other",
        }
    }
    let seen: BTreeSet<_> = samples::ups().iter().map(|(_, frame)| up(frame)).collect();
    assert_eq!(seen.len(), 8, "{seen:?}");
    let seen: BTreeSet<_> = samples::downs().iter().map(|(_, frame)| down(frame)).collect();
    assert_eq!(seen.len(), 6, "{seen:?}");
    let seen: BTreeSet<_> = samples::peers().iter().map(|(_, frame)| peer(frame)).collect();
    assert_eq!(seen.len(), 9, "{seen:?}");
}

#[test]
fn a_message_of_a_newer_build_with_more_fields_is_read() {
    fn with_more(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.values_mut().for_each(with_more);
                // Maps from names to values would take it for an entry.
                if !fields.contains_key("q35") {
                    fields.insert("from-the-future".into(), Value::Array(vec![]));
                }
            }
            Value::Array(items) => items.iter_mut().for_each(with_more),
            _ => {}
        }
    }
    for (name, sample) in samples::ups() {
        let mut value = serde_json::to_value(&sample).unwrap();
        with_more(&mut value);
        let read: Up = serde_json::from_value(value).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read, sample);
    }
    for (name, sample) in samples::downs() {
        let mut value = serde_json::to_value(&sample).unwrap();
        with_more(&mut value);
        let read: Down = serde_json::from_value(value).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read, sample);
    }
}
