//! Agents' sessions: reports take effect once, whatever dies in between; strangers and nonsense are refused.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use model::{Code, Sequence};
use support::{Cell, Fault, PATIENCE, facts, hello};
use tokio::net::TcpStream;
use uuid::Uuid;
use wire::{Down, Up};

const RUN: Uuid = Uuid::from_u128(77);

/// How many reboots of hosts were noticed up to now.
async fn reboots(cell: &Cell) -> usize {
    cell.join("mark").await;
    let mut watch = cell.handle.watch(cell.admin(), Some(Sequence(0)));
    let mut count = 0;
    loop {
        let item = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
        let controller::WatchItem::Notice(notice) = item else {
            continue;
        };
        count += usize::from(notice.what == "host.rebooted");
        if notice.what == "host.joined" && notice.name.as_str() == "mark" {
            return count;
        }
    }
}

#[tokio::test]
async fn a_session_resumes_without_losing_or_repeating_a_reports_effect() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    assert_eq!(session.accepted().received, Sequence(0));
    // Each change of boot is a notice, so each report's effect can be counted.
    session.report(1, facts(1, 1)).await;
    session.report(2, facts(2, 1)).await;
    session.report(3, facts(1, 1)).await;
    session.acknowledged(3).await;
    session.cut();

    // The agent saw the first acknowledgement only: it sends the others again unless it believes the answer.
    let link = host.connect(cell.agents_address()).await;
    let mut session = link.session(hello(RUN, 1)).await.unwrap();
    assert_eq!(session.accepted().received, Sequence(3));
    for sequence in [2, 3, 4] {
        session.report(sequence, facts(2 - u128::from(sequence % 2), 1)).await;
    }
    session.acknowledged(4).await;
    // 1 to 2, 2 to 1, 1 to 2: had one been repeated or lost, the count would differ.
    assert_eq!(reboots(&cell).await, 3);
}

#[tokio::test]
async fn a_controller_killed_between_reports_and_acknowledgement_takes_them_again() {
    let mut cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    cell.storage.hold();
    session.report(2, facts(2, 1)).await;
    cell.crash().await;
    cell.storage.let_go();
    while session.next().await.is_some() {}

    let link = host.connect(cell.agents_address()).await;
    let mut session = link.session(hello(RUN, 1)).await.unwrap();
    // The new process knows nothing of this run of the agent but what the agent says.
    assert_eq!(session.accepted().received, Sequence(1));
    session.report(2, facts(2, 1)).await;
    session.acknowledged(2).await;
    assert_eq!(reboots(&cell).await, 1);
}

#[tokio::test]
async fn a_gap_in_the_numbers_ends_the_session_before_anything_after_it_counts() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(2, facts(1, 1)).await;
    match session.next().await {
        Some(Down::Close { reason }) => assert!(reason.message.contains("missing"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let session = host.session(&cell, RUN).await;
    assert_eq!(session.accepted().received, Sequence(0));
}

#[tokio::test]
async fn a_newer_session_of_a_host_replaces_the_older() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut old = host.session(&cell, RUN).await;
    let mut new = host.session(&cell, RUN).await;
    match old.next().await {
        Some(Down::Close { reason }) => assert!(reason.message.contains("newer session"), "{reason}"),
        other => panic!("{other:?}"),
    }
    new.report(1, facts(1, 1)).await;
    new.acknowledged(1).await;
}

#[tokio::test]
async fn nonsense_ends_the_session_and_harms_nobody() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let mut deep_frame = u32::try_from(deep.len()).unwrap().to_be_bytes().to_vec();
    deep_frame.extend_from_slice(deep.as_bytes());
    let unknown = br#"{"frame":"report","sequence":1,"report":{"report":"teleport"}}"#;
    let mut unknown_frame = u32::try_from(unknown.len()).unwrap().to_be_bytes().to_vec();
    unknown_frame.extend_from_slice(unknown);
    for (bytes, why) in [
        (u32::MAX.to_be_bytes().to_vec(), "4294967295 bytes"),
        (deep_frame, "no message"),
        (unknown_frame, "teleport"),
    ] {
        let mut session = host.session(&cell, RUN).await;
        session.up.send(Bytes::from(bytes)).await.unwrap();
        match session.next().await {
            Some(Down::Close { reason }) => assert!(reason.message.contains(why), "{reason}"),
            other => panic!("{why}: {other:?}"),
        }
    }
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
}

#[tokio::test]
async fn a_session_of_another_version_epoch_or_beginning_is_refused_with_a_reason() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut future = hello(RUN, 0);
    (future.version_min, future.version_max) = (2, 3);
    let mut led = hello(RUN, 0);
    led.epoch = model::Epoch(2);
    for (hello, code) in [(future, Code::Incompatible), (led, Code::Stale)] {
        let link = host.connect(cell.agents_address()).await;
        let problem = link.session(hello).await.err().unwrap();
        assert_eq!(problem.code, code, "{problem:?}");
    }
    let link = host.connect(cell.agents_address()).await;
    let heartbeat = wire::encode(&Up::Heartbeat, 100).unwrap();
    let (_up, response) = link.post(wire::session::SESSION_PATH, None, Some(heartbeat)).await;
    assert_eq!(response.status(), 400);
}

#[tokio::test]
async fn strangers_do_not_get_through_the_handshake() {
    let cell = Cell::start().await;
    let other = Cell::start().await;
    let stranger = other.join("h1").await;
    let config = Arc::new(identity::tls::to_controller(&stranger.identity).unwrap());
    let stream = TcpStream::connect(cell.agents_address()).await.unwrap();
    let refused = identity::tls::connect(&config, identity::tls::unnamed(), stream, PATIENCE).await;
    assert!(refused.is_err());

    // No certificate: with TLS 1.3 the refusal arrives with the first read.
    let authority = identity::CaCertificate::from_pem(&std::fs::read(cell.state().ca_certificate()).unwrap()).unwrap();
    let config = Arc::new(identity::tls::joining(authority.fingerprint()).unwrap());
    let stream = TcpStream::connect(cell.agents_address()).await.unwrap();
    match identity::tls::connect(&config, identity::tls::unnamed(), stream, PATIENCE).await {
        Err(_) => {}
        Ok(mut stream) => {
            use tokio::io::AsyncReadExt as _;
            assert!(stream.read_u8().await.is_err());
        }
    }
}

#[tokio::test]
async fn a_removed_host_is_disconnected_and_not_let_in_again() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    let command = model::Command::RemoveHost(model::name::Reference::Id(host.id.0));
    cell.handle
        .submit(cell.admin(), command, Default::default())
        .await
        .unwrap();
    match session.next().await {
        Some(Down::Close { reason }) => assert_eq!(reason.code, Code::Forbidden),
        other => panic!("{other:?}"),
    }
    let problem = host
        .connect(cell.agents_address())
        .await
        .session(hello(RUN, 0))
        .await
        .err()
        .unwrap();
    assert_eq!(problem.code, Code::Forbidden);
}

#[tokio::test]
async fn a_full_disk_closes_sessions_and_they_resume_when_it_is_not() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    cell.storage.set(Fault::Full);
    session.report(2, facts(2, 1)).await;
    match session.next().await {
        Some(Down::Close { reason }) => assert_eq!(reason.code, Code::ReadOnly),
        other => panic!("{other:?}"),
    }
    let problem = host
        .connect(cell.agents_address())
        .await
        .session(hello(RUN, 1))
        .await
        .err()
        .unwrap();
    assert_eq!(problem.code, Code::ReadOnly);
    cell.storage.set(Fault::None);
    let mut session = loop {
        // It recovers by itself within a second; a real agent backs off likewise.
        if let Ok(session) = host.connect(cell.agents_address()).await.session(hello(RUN, 1)).await {
            break session;
        }
    };
    assert_eq!(session.accepted().received, Sequence(1));
    session.report(2, facts(2, 1)).await;
    session.acknowledged(2).await;
}

#[tokio::test]
async fn a_host_without_an_agent_is_an_alarm_after_ten_seconds_and_none_when_it_comes_back_before() {
    let cell = Cell::start().await;
    let (gone, back) = (cell.join("gone").await, cell.join("back").await);
    let sessions = (gone.session(&cell, RUN).await, back.session(&cell, RUN).await);
    let mut watch = cell.handle.watch(cell.admin(), None);
    let begun = std::time::Instant::now();
    sessions.0.cut();
    sessions.1.cut();
    let mut session = back.session(&cell, RUN).await;
    let heartbeat = session.up.clone();
    let alarm = async {
        tokio::select! {
            item = watch.next() => match item {
                Some(controller::WatchItem::Notice(notice)) => notice,
                other => panic!("{other:?}"),
            },
            _ = session.next() => panic!("the session has nothing to say"),
        }
    };
    let alive = async {
        let beat = wire::encode(&Up::Heartbeat, 100).unwrap();
        let mut every = tokio::time::interval(wire::session::HEARTBEAT);
        loop {
            every.tick().await;
            heartbeat.send(beat.clone()).await.unwrap();
        }
    };
    let notice = tokio::select! {
        notice = tokio::time::timeout(PATIENCE, alarm) => notice.unwrap(),
        () = alive => unreachable!(),
    };
    assert_eq!((notice.what.as_str(), notice.id), ("host.lost", gone.id.0));
    assert!(begun.elapsed() >= wire::session::LOST_AFTER - std::time::Duration::from_secs(1));
}
