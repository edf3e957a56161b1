//! A session holds its promises whatever the peer does: here the peer is played, on the other end of a socket pair.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

use proptest::prelude::*;
use qmp::{CloseReason, CodecError, CommandError, ConnectError, EventKind, GetFd, Limits, Session};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#;

struct Peer {
    input: BufReader<OwnedReadHalf>,
    output: OwnedWriteHalf,
}

impl Peer {
    async fn says(&mut self, line: &str) {
        self.output.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn hears(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.input.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn returns(&mut self, to: &serde_json::Value) {
        self.says(&format!(r#"{{"return": {{}}, "id": {}}}"#, to["id"])).await;
    }
}

fn limits() -> Limits {
    Limits {
        events_max: 8,
        command_deadline: Duration::from_secs(5),
        ..Limits::default()
    }
}

async fn pair(limits: Limits) -> (Session, qmp::Events, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (input, output) = theirs.into_split();
    let mut peer = Peer {
        input: BufReader::new(input),
        output,
    };
    let play = async {
        peer.says(GREETING).await;
        let negotiation = peer.hears().await;
        assert_eq!(negotiation["arguments"]["enable"][0], "oob");
        peer.returns(&negotiation).await;
    };
    let (session, ()) = tokio::join!(Session::over(ours, limits), play);
    let (session, events) = session.unwrap();
    (session, events, peer)
}

fn reason(error: &CommandError) -> &CloseReason {
    let CommandError::Closed { reason, .. } = error else {
        panic!("{error}")
    };
    reason
}

#[tokio::test]
async fn answers_find_their_commands_and_events_pass_between() {
    let (session, mut events, mut peer) = pair(limits()).await;
    let play = async {
        let first = peer.hears().await;
        let second = peer.hears().await;
        peer.says(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 5}}"#)
            .await;
        peer.says(&format!(
            r#"{{"return": {{"status": "paused", "running": false}}, "id": {}}}"#,
            second["id"]
        ))
        .await;
        peer.says(&format!(
            r#"{{"error": {{"class": "GenericError", "desc": "no"}}, "id": {}}}"#,
            first["id"]
        ))
        .await;
    };
    let (stop, status, ()) = tokio::join!(
        session.execute(qmp::Stop {}),
        session.execute(qmp::QueryStatus {}),
        play
    );
    assert_eq!(status.unwrap().status, qmp::RunState::Paused);
    assert_eq!(stop.unwrap_err().to_string(), "QEMU refused `stop`: no");
    let event = events.recv().await.unwrap();
    assert_eq!((event.at_us, event.kind), (1_000_005, EventKind::Stop));
}

#[tokio::test]
async fn a_closed_session_fails_what_waits_and_what_comes() {
    let (session, mut events, peer) = pair(limits()).await;
    let (status, stop, ()) = tokio::join!(
        session.execute(qmp::QueryStatus {}),
        session.execute(qmp::Stop {}),
        async {
            drop(peer);
        }
    );
    assert_eq!(reason(&status.unwrap_err()), &CloseReason::PeerClosed);
    assert_eq!(reason(&stop.unwrap_err()), &CloseReason::PeerClosed);
    assert_eq!(
        reason(&session.execute(qmp::Cont {}).await.unwrap_err()),
        &CloseReason::PeerClosed
    );
    assert_eq!(session.closed().await, CloseReason::PeerClosed);
    assert!(events.recv().await.is_none());
}

#[tokio::test]
async fn a_deadline_fails_one_command_and_its_late_answer_harms_nobody() {
    let (session, _events, mut peer) = pair(limits()).await;
    let late = session.execute_within(qmp::Stop {}, Duration::from_millis(20)).await;
    assert!(matches!(late, Err(CommandError::Deadline { .. })), "{late:?}");
    let play = async {
        let stop = peer.hears().await;
        peer.returns(&stop).await;
        let cont = peer.hears().await;
        assert_eq!(cont["execute"], "cont");
        peer.returns(&cont).await;
    };
    let (cont, ()) = tokio::join!(session.execute(qmp::Cont {}), play);
    cont.unwrap();
}

#[tokio::test]
async fn a_stuck_qemu_still_gets_the_out_of_band_command() {
    let (session, _events, mut peer) = pair(limits()).await;
    for _ in 0..20 {
        let stuck = session
            .execute_within(qmp::QueryStatus {}, Duration::from_millis(2))
            .await;
        assert!(matches!(stuck, Err(CommandError::Deadline { .. })));
    }
    let play = async {
        let mut in_band = 0;
        loop {
            let heard = peer.hears().await;
            if heard["exec-oob"] == "yank" {
                assert_eq!(heard["arguments"]["instances"][0]["type"], "migration");
                peer.returns(&heard).await;
                return in_band;
            }
            in_band += 1;
        }
    };
    let yank = qmp::Yank {
        instances: vec![qmp::YankInstance::Migration],
    };
    let (yanked, in_band) = tokio::join!(session.execute(yank), play);
    yanked.unwrap();
    assert!(in_band < 8, "QEMU would have stopped reading after {in_band}");
}

#[tokio::test]
async fn essential_events_are_never_lost_and_others_never_close_the_session() {
    let (session, mut events, mut peer) = pair(limits()).await;
    for _ in 0..100 {
        peer.says(r#"{"event": "RTC_CHANGE", "data": {"offset": 1}}"#).await;
    }
    for pass in 1..=4 {
        peer.says(&format!(r#"{{"event": "MIGRATION_PASS", "data": {{"pass": {pass}}}}}"#))
            .await;
    }
    let play = async {
        let status = peer.hears().await;
        peer.returns(&status).await;
    };
    let (alive, ()) = tokio::join!(session.execute(qmp::QueryStatus {}), play);
    alive.unwrap();
    peer.says(r#"{"event": "STOP"}"#).await;
    assert_eq!(session.closed().await, CloseReason::EventOverflow { bound: 8 });
    assert_eq!(events.dropped(), 96);
    let mut passes = Vec::new();
    while let Some(event) = events.recv().await {
        if let EventKind::MigrationPass { pass } = event.kind {
            passes.push(pass);
        }
    }
    assert_eq!(passes, [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_reader_that_went_away_delays_nobody() {
    let (session, events, mut peer) = pair(limits()).await;
    drop(events);
    let play = async {
        for _ in 0..50 {
            peer.says(r#"{"event": "STOP"}"#).await;
        }
        let heard = peer.hears().await;
        peer.returns(&heard).await;
    };
    let (alive, ()) = tokio::join!(session.execute(qmp::QueryStatus {}), play);
    alive.unwrap();
}

/// Waits for bytes and reads once, with the descriptors that came.
async fn receive(stream: &UnixStream) -> (String, Vec<OwnedFd>) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let count = loop {
        stream.readable().await.unwrap();
        let got = stream.try_io(tokio::io::Interest::READABLE, || {
            let mut into = [std::io::IoSliceMut::new(&mut bytes)];
            Ok(recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes)
        });
        match got {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            got => break got.unwrap(),
        }
    };
    let descriptors = control
        .drain()
        .flat_map(|message| {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fds.collect()
            } else {
                vec![]
            }
        })
        .collect();
    (String::from_utf8_lossy(&bytes[..count]).into_owned(), descriptors)
}

#[tokio::test]
async fn each_descriptor_travels_with_its_own_command_and_not_before_the_last_is_answered() {
    let (session, _events, peer) = pair(limits()).await;
    let mut stream = peer.input.into_inner().reunite(peer.output).unwrap();
    let file = |text: &str| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        OwnedFd::from(file)
    };
    let first = session.execute(GetFd::new("first", file("1")));
    let second = session.execute(GetFd::new("second", file("2")));
    let play = async {
        for (name, content) in [("first", "1"), ("second", "2")] {
            let (line, descriptors) = receive(&stream).await;
            let heard: serde_json::Value = serde_json::from_str(&line).expect("one whole command");
            assert_eq!(heard["arguments"]["fdname"], name);
            let mut file = File::from(descriptors.into_iter().next().expect("came along"));
            file.rewind().unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, content);
            let answer = format!(r#"{{"return": {{}}, "id": {}}}"#, heard["id"]);
            stream.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
        }
    };
    let (first, second, ()) = tokio::join!(first, second, play);
    first.unwrap();
    second.unwrap();
}

#[tokio::test]
async fn a_peer_out_of_step_closes_the_session_with_a_reason() {
    for line in [
        r#"{"return": {}, "id": 77}"#,
        r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
        GREETING,
    ] {
        let (session, _events, mut peer) = pair(limits()).await;
        peer.says(line).await;
        assert!(matches!(session.closed().await, CloseReason::OutOfStep(_)), "{line}");
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_shape_fails_its_command_only() {
    let (session, _events, mut peer) = pair(limits()).await;
    let play = async {
        let heard = peer.hears().await;
        peer.says(&format!(r#"{{"return": [1], "id": {}}}"#, heard["id"])).await;
        let heard = peer.hears().await;
        peer.returns(&heard).await;
    };
    let calls = async {
        (
            session.execute(qmp::QueryMachines {}).await,
            session.execute(qmp::Stop {}).await,
        )
    };
    let ((machines, stop), ()) = tokio::join!(calls, play);
    assert!(matches!(machines, Err(CommandError::Answer { .. })), "{machines:?}");
    stop.unwrap();
}

#[tokio::test]
async fn a_silent_peer_is_no_session() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let limits = Limits {
        greeting_deadline: Duration::from_millis(20),
        ..Limits::default()
    };
    assert!(matches!(
        Session::over(ours, limits).await,
        Err(ConnectError::NoGreeting(_))
    ));
    let absent = Session::connect("/nonexistent/qmp.sock".as_ref(), Limits::default()).await;
    assert!(matches!(absent, Err(ConnectError::Socket { .. })));
}

#[tokio::test]
async fn a_command_too_long_is_refused_here() {
    let (session, _events, _peer) = pair(Limits {
        line_bytes_max: 512,
        ..limits()
    })
    .await;
    let long = session.execute(qmp::DeviceDel { id: "x".repeat(600) }).await;
    assert!(matches!(long, Err(CommandError::Encode { .. })), "{long:?}");
}

#[tokio::test]
async fn the_session_ends_with_its_last_handle() {
    let (session, mut events, mut peer) = pair(limits()).await;
    let other = session.clone();
    drop(session);
    drop(other);
    assert!(events.recv().await.is_none());
    let mut line = String::new();
    assert_eq!(
        peer.input.read_line(&mut line).await.unwrap(),
        0,
        "the socket was closed"
    );
}

proptest! {
    #[test]
    fn a_hostile_peer_gives_a_typed_end(bytes in proptest::collection::vec(any::<u8>(), 0..2048), late in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            if late {
                let (session, _events, mut peer) = pair(limits()).await;
                let _ = peer.output.write_all(&bytes).await;
                drop(peer);
                let ended = session.execute(qmp::QueryStatus {}).await.unwrap_err();
                let known = matches!(reason(&ended), CloseReason::PeerClosed
                    | CloseReason::Codec(CodecError::Malformed { .. }) | CloseReason::OutOfStep(_));
                prop_assert!(known, "{ended}");
            } else {
                let (ours, mut theirs) = UnixStream::pair().unwrap();
                theirs.write_all(&bytes).await.unwrap();
                drop(theirs);
                prop_assert!(matches!(Session::over(ours, limits()).await, Err(ConnectError::Closed(_))));
            }
            Ok(())
        })?;
    }
}
