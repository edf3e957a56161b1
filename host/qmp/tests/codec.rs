//! The codec reads what real QEMUs said, and no bytes whatever make it panic or grow.

use proptest::prelude::*;
use proptest::sample::select;
use qmp::{Codec, CodecError, Event, EventKind, Message, MigrationInfo, MigrationStatus, RunState, YankInstance};
use serde::de::DeserializeOwned;

const SOURCES: [(&str, &[u8]); 2] = [
    ("7.2", include_bytes!("fixtures/qemu-7.2-source.jsonl")),
    ("10.0", include_bytes!("fixtures/qemu-10.0-source.jsonl")),
];
const DESTINATIONS: [(&str, &[u8]); 2] = [
    ("7.2", include_bytes!("fixtures/qemu-7.2-destination.jsonl")),
    ("10.0", include_bytes!("fixtures/qemu-10.0-destination.jsonl")),
];
const LINE_BYTES_MAX: usize = 1 << 20;
const EVENT_BYTES_MAX: usize = 1 << 12;

fn codec() -> Codec {
    Codec::new(LINE_BYTES_MAX, EVENT_BYTES_MAX)
}

/// All messages up to the end of the bytes or the first error.
fn decode(codec: &mut Codec, bytes: &[u8]) -> (Vec<Message>, Option<CodecError>) {
    codec.push(bytes);
    let mut messages = Vec::new();
    loop {
        match codec.next_message() {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return (messages, None),
            Err(error) => return (messages, Some(error)),
        }
    }
}

fn recorded(bytes: &[u8]) -> Vec<Message> {
    let (messages, error) = decode(&mut codec(), bytes);
    assert_eq!(error, None);
    assert_eq!(messages.len(), bytes.iter().filter(|b| **b == b'\n').count());
    messages
}

fn answer<T: DeserializeOwned>(messages: &[Message], wanted: u64) -> T {
    let value = messages.iter().find_map(|message| match message {
        Message::Return { id, value } if *id == wanted => Some(value.clone()),
        _ => None,
    });
    serde_json::from_value(value.expect("recorded")).expect("documented shape")
}

fn events(messages: &[Message]) -> Vec<Event> {
    messages
        .iter()
        .filter_map(|m| {
            if let Message::Event(event) = m {
                Some(event.clone())
            } else {
                None
            }
        })
        .collect()
}

#[test]
fn the_answers_of_both_qemus_are_read() {
    for (version, bytes) in SOURCES {
        let said = recorded(bytes);
        let Message::Greeting {
            version: greeted,
            capabilities,
        } = &said[0]
        else {
            panic!("no greeting")
        };
        assert!(greeted.qemu.to_string().starts_with(version));
        assert_eq!(capabilities, &["oob"]);
        assert_eq!(&answer::<qmp::Version>(&said, 2), greeted);
        assert_eq!(
            answer::<qmp::KvmInfo>(&said, 3),
            qmp::KvmInfo {
                enabled: false,
                present: true
            }
        );
        assert_eq!(answer::<qmp::NameInfo>(&said, 4).name.as_deref(), Some("fixture"));
        assert_eq!(answer::<qmp::UuidInfo>(&said, 5).uuid.len(), 36);
        assert_eq!(answer::<qmp::StatusInfo>(&said, 6).status, RunState::Prelaunch);

        let machines = answer::<Vec<qmp::Machine>>(&said, 7);
        let q35 = machines
            .iter()
            .find(|m| m.alias.as_deref() == Some("q35"))
            .expect("has q35");
        assert_eq!(q35.name, format!("pc-q35-{version}"));
        assert!(q35.cpu_max >= 255);
        assert!(machines.iter().any(|m| m.is_default));

        let capabilities = answer::<Vec<qmp::CapabilityState>>(&said, 8);
        let on: Vec<_> = capabilities
            .iter()
            .filter(|c| c.state)
            .map(|c| c.capability.as_str())
            .collect();
        assert_eq!(on, ["events", "return-path", "late-block-activate"]);
        assert!(answer::<Vec<qmp::CpuInfo>>(&said, 9)[0].thread_id > 1);
        assert_eq!(answer::<Vec<qmp::BlockStats>>(&said, 10)[0].node_name, "disk0");
        assert_eq!(answer::<MigrationInfo>(&said, 11), MigrationInfo::default());
        let nodes = answer::<Vec<qmp::BlockNode>>(&said, 14);
        assert_eq!(
            nodes.iter().map(|n| n.drv.as_str()).collect::<Vec<_>>(),
            ["raw", "file"]
        );
        assert!(nodes.iter().all(|n| n.active && n.file == "/images/disk.raw"));
    }
}

#[test]
fn a_recorded_migration_is_read_from_setup_to_completed() {
    for (_, bytes) in SOURCES {
        let said = recorded(bytes);
        let under_way = answer::<MigrationInfo>(&said, 21);
        assert_eq!(under_way.status, MigrationStatus::Active);
        let ram = under_way.ram.expect("counted");
        assert_eq!((ram.total, ram.page_size, ram.dirty_sync_count), (34_086_912, 4096, 1));
        assert!(ram.remaining > 0 && ram.transferred > 0 && ram.precopy_bytes > 0);
        assert!(answer::<Vec<YankInstance>>(&said, 22).contains(&YankInstance::Migration));
        // Stopped by `stop`: it stays so when the migration fails, unlike `finish-migrate`.
        assert_eq!(answer::<qmp::StatusInfo>(&said, 24).status, RunState::Paused);
        let done = said
            .iter()
            .filter_map(|m| {
                if let Message::Return { value, .. } = m {
                    Some(value)
                } else {
                    None
                }
            })
            .filter_map(|value| serde_json::from_value::<MigrationInfo>(value.clone()).ok())
            .find(|info| info.status == MigrationStatus::Completed)
            .expect("completed");
        assert!(done.downtime.is_some() && done.total_time > Some(300) && done.status.is_over());

        let kinds: Vec<_> = events(&said).into_iter().map(|e| e.kind).collect();
        let at = |wanted: &EventKind| kinds.iter().position(|k| k == wanted).expect("told");
        let migration = |status| EventKind::Migration { status };
        let order = [
            at(&EventKind::Resume),
            at(&migration(MigrationStatus::Setup)),
            at(&EventKind::MigrationPass { pass: 1 }),
            at(&migration(MigrationStatus::Active)),
            at(&EventKind::Stop),
            at(&EventKind::MigrationPass { pass: 2 }),
            at(&migration(MigrationStatus::Completed)),
            at(&EventKind::Shutdown {
                guest: false,
                reason: qmp::ShutdownCause::HostQmpQuit,
            }),
        ];
        assert!(order.is_sorted(), "{order:?}");
        assert!(events(&said).is_sorted_by_key(|event| event.at_us));
        assert!(events(&said).iter().all(|event| event.is_essential()));
    }
}

#[test]
fn a_recorded_destination_is_read() {
    for (version, bytes) in DESTINATIONS {
        let said = recorded(bytes);
        assert_eq!(answer::<MigrationInfo>(&said, 3).status, MigrationStatus::Completed);
        assert_eq!(answer::<qmp::StatusInfo>(&said, 4).status, RunState::Paused);
        let inactive = answer::<Vec<qmp::BlockNode>>(&said, 5).iter().any(|node| !node.active);
        assert_eq!(
            inactive,
            version == "10.0",
            "only the newer one says that its disks wait for cont"
        );
    }
}

#[test]
fn a_command_that_this_qemu_lacks_is_told_by_its_class() {
    for (_, bytes) in SOURCES {
        let refusals: Vec<_> = recorded(bytes)
            .into_iter()
            .filter_map(|m| {
                if let Message::Error { id, class, .. } = m {
                    Some((id, class))
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(
            refusals,
            [
                (Some(17), "CommandNotFound".into()),
                (Some(18), "DeviceNotFound".into())
            ]
        );
    }
}

#[test]
fn words_and_events_of_a_newer_qemu_are_kept() {
    let (said, error) = decode(
        &mut codec(),
        b"{\"event\": \"NOVELTY\", \"data\": {\"a\": 1}, \"timestamp\": {\"seconds\": -1, \"microseconds\": -1}}\n\
          {\"event\": \"MIGRATION\", \"data\": {\"status\": \"folding\"}, \"timestamp\": {\"seconds\": 2, \"microseconds\": 3}}\n\
          {\"event\": \"BLOCK_JOB_READY\", \"data\": {\"device\": \"j\", \"len\": 4, \"offset\": 4, \"type\": \"mirror\"}}\n",
    );
    assert_eq!(error, None);
    let events = events(&said);
    assert_eq!(
        events[0].kind,
        EventKind::Other {
            name: "NOVELTY".into(),
            data: serde_json::json!({"a": 1})
        }
    );
    assert_eq!((events[0].at_us, events[1].at_us), (0, 2_000_003));
    assert_eq!(
        events[1].kind,
        EventKind::Migration {
            status: MigrationStatus::Other("folding".into())
        }
    );
    let EventKind::BlockJob(job) = &events[2].kind else {
        panic!("{events:?}")
    };
    assert_eq!(
        (&job.step, job.device.as_str(), job.len),
        (&qmp::BlockJobStep::Ready, "j", 4)
    );
    assert!(!events[0].is_essential() && events[1].is_essential() && events[2].is_essential());
}

#[test]
fn a_line_or_an_event_past_its_bound_is_refused() {
    let endless = vec![b' '; LINE_BYTES_MAX + 1];
    assert_eq!(
        decode(&mut codec(), &endless).1,
        Some(CodecError::LineTooLong { limit: LINE_BYTES_MAX })
    );
    let event = format!("{{\"event\": \"X\", \"data\": \"{}\"}}\n", "x".repeat(EVENT_BYTES_MAX));
    assert_eq!(
        decode(&mut codec(), event.as_bytes()).1,
        Some(CodecError::EventTooLong { limit: EVENT_BYTES_MAX })
    );
    let deep = format!("{}\n", "[".repeat(100_000));
    assert!(matches!(
        decode(&mut codec(), deep.as_bytes()).1,
        Some(CodecError::Malformed { .. })
    ));
}

const KEYS: &[&str] = &["QMP", "return", "error", "event", "data", "timestamp", "id"];
const VALUES: &[&str] = &[
    "null",
    "-1",
    "1e400",
    "[{}]",
    "\"STOP\"",
    "\"BLOCK_JOB_READY\"",
    "{\"version\": 1}",
    "{\"seconds\": -9e99}",
    "18446744073709551615",
];
const DATA: &[&str] = &[
    "null",
    "7",
    "[]",
    "{\"status\": 3}",
    "{\"pass\": -1}",
    "{\"len\": \"x\"}",
];

proptest! {
    #[test]
    fn any_bytes_give_messages_or_one_typed_error(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        decode(&mut codec(), &bytes);
    }

    #[test]
    fn any_json_gives_messages_or_one_typed_error(
        key in select(KEYS),
        other in select(KEYS),
        value in select(VALUES),
        data in select(DATA),
    ) {
        decode(&mut codec(), format!("{{\"{key}\": {value}, \"{other}\": {data}}}\n").as_bytes());
    }

    #[test]
    fn a_recording_with_damage_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>(), which in 0..2usize) {
        let mut bytes = SOURCES[which].1.to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let (whole, _) = decode(&mut codec(), SOURCES[which].1);
        let (damaged, error) = decode(&mut codec(), &bytes);
        // Damage in one line leaves the lines before it as they were.
        let before = SOURCES[which].1[..at].iter().filter(|b| **b == b'\n').count();
        prop_assert!(error.is_some() || damaged.len() + 1 >= whole.len());
        prop_assert_eq!(&damaged[..before], &whole[..before]);
    }

    #[test]
    fn how_the_bytes_are_cut_makes_no_difference(cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20)) {
        let bytes = DESTINATIONS[0].1;
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).chain([0, bytes.len()]).collect();
        cuts.sort_unstable();
        let mut codec = codec();
        let pieces: Vec<_> = cuts.windows(2).flat_map(|w| decode(&mut codec, &bytes[w[0]..w[1]]).0).collect();
        prop_assert_eq!(pieces, recorded(bytes));
    }
}
