//! Two real tunnels over loopback: exactness, ends of stream, strangers, deaths.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use identity::{ClusterAuthority, NodeIdentity, NodeKey, Role};
use proptest::prelude::*;
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use uuid::Uuid;

use super::*;

const A: Uuid = Uuid::from_u128(0xa);
const B: Uuid = Uuid::from_u128(0xb);
const C: Uuid = Uuid::from_u128(0xc);
const PATIENCE: Duration = Duration::from_secs(30);

/// Identity files of two hosts, a third one of the same cluster, and one of another cluster that claims to be A.
struct Identities(TempDir);

fn identities() -> &'static Path {
    static MADE: OnceLock<Identities> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        for (cluster, hosts) in [
            ("ours", vec![("a", A), ("b", B), ("c", C)]),
            ("theirs", vec![("forged", A)]),
        ] {
            let authority =
                ClusterAuthority::create(&dir.path().join(cluster), Uuid::from_u128(1), SystemTime::now()).unwrap();
            for (name, id) in hosts {
                let key = NodeKey::generate().unwrap();
                let request = key.request().unwrap();
                let issued = authority
                    .issue(&request, Role::Host(id), SystemTime::now())
                    .unwrap()
                    .to_vec();
                let node = NodeIdentity::new(key, issued, authority.certificate().clone()).unwrap();
                node.save(&dir.path().join(name)).unwrap();
            }
        }
        Identities(dir)
    });
    made.0.path()
}

fn spec(dir: &Path, name: &str, peer: Uuid, side: Side) -> TunnelSpec {
    TunnelSpec {
        version: VERSION,
        directory: dir.join(format!("{name}.d")),
        identity: identities().join(name),
        peer,
        token: Token::new([7; 32]),
        side,
        connect_ms_max: 20_000,
        begin_ms_max: 20_000,
        silence_ms_max: 10_000,
    }
}

/// Waits until a tunnel's status is as wanted.
fn until(spec: &TunnelSpec, wanted: impl Fn(&TunnelStatus) -> bool) -> TunnelStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = TunnelStatus::read(&spec.status_path());
        match status {
            Ok(status) if wanted(&status) => return status,
            status => assert!(Instant::now() < deadline, "status {status:?}"),
        }
        // tidy: sleep because the status is another process's file; the agent itself watches it by inotify
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Pair {
    dir: TempDir,
    qemu_b: UnixListener,
    b: TunnelSpec,
    b_runs: JoinHandle<Result<(), TunnelError>>,
    address: SocketAddr,
}

fn go(spec: &TunnelSpec) -> JoinHandle<Result<(), TunnelError>> {
    spec.write().unwrap();
    let spec = spec.clone();
    std::thread::spawn(move || run(&spec))
}

fn destination(change: impl FnOnce(&mut TunnelSpec)) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let incoming = dir.path().join("incoming");
    let qemu_b = UnixListener::bind(&incoming).unwrap();
    let side = Side::Destination {
        listen: "127.0.0.1:0".parse().unwrap(),
        incoming,
    };
    let mut b = spec(dir.path(), "b", A, side);
    change(&mut b);
    let b_runs = go(&b);
    let port = until(&b, |status| status.port.is_some()).port.unwrap();
    Pair {
        dir,
        qemu_b,
        b,
        b_runs,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
    }
}

impl Pair {
    fn source(&self) -> TunnelSpec {
        let side = Side::Source {
            listen: self.dir.path().join("outgoing"),
            peer_address: self.address,
            leash: false,
        };
        spec(self.dir.path(), "a", B, side)
    }

    /// One of QEMU's connections, both ends.
    fn channel(&self) -> (UnixStream, UnixStream) {
        let near = UnixStream::connect(self.dir.path().join("outgoing")).unwrap();
        let (far, _) = self.qemu_b.accept().unwrap();
        for end in [&near, &far] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
            end.set_write_timeout(Some(PATIENCE)).unwrap();
        }
        (near, far)
    }

    /// Nothing has reached B's QEMU.
    fn untouched(&self) {
        self.qemu_b.set_nonblocking(true).unwrap();
        assert_eq!(self.qemu_b.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        self.qemu_b.set_nonblocking(false).unwrap();
    }
}

/// A pair of running tunnels, the first connection made.
fn connected() -> (Pair, TunnelSpec, JoinHandle<Result<(), TunnelError>>) {
    let pair = destination(|_| {});
    let a = pair.source();
    let a_runs = go(&a);
    until(&a, |status| status.phase == Phase::Connected);
    (pair, a, a_runs)
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn send(mut to: UnixStream, bytes: Vec<u8>, chunks: Vec<usize>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut rest = bytes.as_slice();
        for chunk in chunks.iter().cycle() {
            let (now, later) = rest.split_at((*chunk).min(rest.len()));
            to.write_all(now).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        to.shutdown(Shutdown::Write).unwrap();
    })
}

fn read_all(from: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn bytes_and_ends_of_stream_pass_exactly_both_ways(
        there in 0usize..3_000_000, back in 0usize..600_000,
        chunks in prop::collection::vec(1usize..300_000, 1..8), seed: u64, back_first: bool,
    ) {
        let (pair, a, a_runs) = connected();
        let (mut near, mut far) = pair.channel();
        let (forth, reply) = (noise(seed, there), noise(!seed, back));
        let sends_first = if back_first { &far } else { &near }.try_clone().unwrap();
        let sends_then = if back_first { &near } else { &far }.try_clone().unwrap();
        let (first, then) = if back_first { (&reply, &forth) } else { (&forth, &reply) };
        let one = send(sends_first, first.clone(), chunks.clone());
        // The second direction starts only after the first has ended: the half-closed state carries data.
        let received = read_all(if back_first { &mut near } else { &mut far });
        prop_assert!(&received == first);
        let two = send(sends_then, then.clone(), chunks);
        let received = read_all(if back_first { &mut far } else { &mut near });
        prop_assert!(&received == then);
        one.join().unwrap();
        two.join().unwrap();
        a_runs.join().unwrap().unwrap();
        pair.b_runs.join().unwrap().unwrap();
        let status = TunnelStatus::read(&a.status_path()).unwrap();
        prop_assert_eq!(status.phase, Phase::Closed);
        prop_assert_eq!((status.sent_bytes, status.received_bytes), (there as u64, back as u64));
        let status = TunnelStatus::read(&pair.b.status_path()).unwrap();
        prop_assert_eq!((status.sent_bytes, status.received_bytes), (back as u64, there as u64));
    }
}

#[test]
fn both_directions_flow_at_once_and_channels_keep_their_order() {
    let (pair, a, a_runs) = connected();
    let channels: Vec<_> = (0..CHANNELS_MAX).map(|_| pair.channel()).collect();
    until(&a, |status| status.channels_open == CHANNELS_MAX);
    // One more is turned away, and disturbs none of the others.
    let mut excess = UnixStream::connect(pair.dir.path().join("outgoing")).unwrap();
    excess.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(excess.read(&mut [0]).unwrap(), 0);
    pair.untouched();
    let mut senders = Vec::new();
    for (number, (near, far)) in channels.iter().enumerate() {
        let seed = number as u64 + 1;
        senders.push(send(near.try_clone().unwrap(), noise(seed, 400_000), vec![70_000]));
        senders.push(send(far.try_clone().unwrap(), noise(seed << 32, 300_000), vec![50_000]));
    }
    for (number, (mut near, mut far)) in channels.into_iter().enumerate() {
        let seed = number as u64 + 1;
        let reader = std::thread::spawn(move || read_all(&mut near));
        assert!(read_all(&mut far) == noise(seed, 400_000), "channel {number}");
        assert!(reader.join().unwrap() == noise(seed << 32, 300_000), "channel {number}");
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    a_runs.join().unwrap().unwrap();
    pair.b_runs.join().unwrap().unwrap();
    let status = TunnelStatus::read(&a.status_path()).unwrap();
    assert_eq!(
        (status.channels_total, status.channels_open, status.refused),
        (CHANNELS_MAX, 0, 1)
    );
}

/// Talks TLS to B as the holder of an identity and gives a token; returns what B answers.
fn knock(address: SocketAddr, identity: &str, token: [u8; 32]) -> std::io::Result<u8> {
    let identity = NodeIdentity::load(&identities().join(identity)).unwrap();
    let config = identity::tls::to_host(&identity, B).unwrap();
    let mut tls = ClientConnection::new(Arc::new(config), identity::tls::unnamed()).unwrap();
    let mut net = TcpStream::connect(address).unwrap();
    net.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut net);
    stream.write_all(&token)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer[0])
}

#[test]
fn strangers_reach_nothing_and_the_right_peer_gets_through_beside_them() {
    let pair = destination(|_| {});
    let silent: Vec<_> = (0..STRANGERS_MAX * 2)
        .map(|_| TcpStream::connect(pair.address).unwrap())
        .collect();
    let mut garbage = TcpStream::connect(pair.address).unwrap();
    garbage.write_all(&[0xff; 10_000]).unwrap();
    // No certificate at all.
    let mut bare = ClientConnection::new(
        Arc::new(identity::tls::joining(identity::Fingerprint([0; 32])).unwrap()),
        ServerName::try_from("b").unwrap(),
    )
    .unwrap();
    let mut net = TcpStream::connect(pair.address).unwrap();
    assert!(rustls::Stream::new(&mut bare, &mut net).write_all(b"x").is_err());
    assert!(
        knock(pair.address, "c", [7; 32]).is_err(),
        "another host of the cluster"
    );
    assert!(knock(pair.address, "b", [7; 32]).is_err(), "the host itself");
    assert!(
        knock(pair.address, "forged", [7; 32]).is_err(),
        "a host of another cluster with the same ids"
    );
    assert!(
        knock(pair.address, "a", [8; 32]).is_err(),
        "another migration of the right host"
    );
    let mut almost = [7; 32];
    almost[31] = 6;
    assert!(knock(pair.address, "a", almost).is_err());
    pair.untouched();
    until(&pair.b, |status| {
        status.refused >= STRANGERS_MAX as u64 + 6 && status.phase == Phase::Listening
    });

    let a = pair.source();
    let a_runs = go(&a);
    let (near, far) = pair_when_connected(&pair, &a);
    exchange(&near, &far);
    drop((near, far, silent));
    a_runs.join().unwrap().unwrap();
    pair.b_runs.join().unwrap().unwrap();
}

fn pair_when_connected(pair: &Pair, a: &TunnelSpec) -> (UnixStream, UnixStream) {
    until(a, |status| status.phase == Phase::Connected);
    pair.channel()
}

fn exchange(mut near: &UnixStream, mut far: &UnixStream) {
    near.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    far.write_all(b"pong").unwrap();
    near.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

#[test]
fn a_source_gives_up_on_a_host_that_is_not_the_expected_one() {
    // C listens where B should.
    let pair = destination(|spec| spec.identity = identities().join("c"));
    let a = pair.source();
    let error = run(&{
        a.write().unwrap();
        a.clone()
    })
    .unwrap_err();
    assert!(matches!(error, TunnelError::Dial(LinkError::WrongPeer(_))), "{error:?}");
    let status = TunnelStatus::read(&a.status_path()).unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error.unwrap().contains(&format!("the peer is host {C}")));
    pair.untouched();
}

#[test]
fn a_source_with_the_token_of_another_migration_does_not_connect() {
    let pair = destination(|spec| spec.token = Token::new([9; 32]));
    let a = pair.source();
    a.write().unwrap();
    assert!(matches!(run(&a), Err(TunnelError::Dial(_))));
    pair.untouched();
}

#[test]
fn deadlines_end_a_tunnel_that_nobody_uses() {
    let pair = destination(|spec| spec.connect_ms_max = 50);
    assert!(matches!(pair.b_runs.join().unwrap(), Err(TunnelError::NobodyCame)));
    // One side has so much time that it is the other that gives up, however slow the machine is.
    let pair = destination(|_| {});
    let mut a = pair.source();
    a.begin_ms_max = 50;
    a.write().unwrap();
    assert!(matches!(run(&a), Err(TunnelError::NotBegun)));
    assert!(matches!(pair.b_runs.join().unwrap(), Err(TunnelError::Left)));
    let pair = destination(|spec| spec.begin_ms_max = 50);
    let a_runs = go(&pair.source());
    assert!(matches!(
        pair.b_runs.join().unwrap(),
        Err(TunnelError::Left | TunnelError::NotBegun)
    ));
    assert!(matches!(a_runs.join().unwrap(), Err(TunnelError::Left)));
}

#[test]
fn a_qemu_that_dies_is_seen_by_the_other_at_once() {
    let (pair, _a, a_runs) = connected();
    let (mut near, far) = pair.channel();
    exchange(&near, &far);
    drop(far);
    // First the end of what B's QEMU sent, then writing to it fails: not before the buffers on the way are full, and no later.
    assert_eq!(near.read(&mut [0]).unwrap(), 0);
    let block = vec![0; 1 << 20];
    let taken = (0..64).take_while(|_| near.write_all(&block).is_ok()).count();
    assert!(taken < 64, "{taken} MiB were taken for a QEMU that is dead");
    assert!(a_runs.join().unwrap().is_err());
    assert!(matches!(
        pair.b_runs.join().unwrap(),
        Err(TunnelError::Relay(RelayError::Local(_)))
    ));
}

/// Not a test: the tunnel process of the tests below, started with the specification's path in the environment.
#[test]
fn tunnel_process() {
    if let Some(spec) = std::env::var_os("GODWIT_TEST_TUNNEL_SPEC") {
        super::main(Path::new(&spec)).unwrap();
    }
}

/// A program that takes `tunnel --spec PATH` as godwit does, and becomes this test binary's `tunnel_process`.
fn tunnel_program(dir: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let program = dir.join("program");
    let me = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\nGODWIT_TEST_TUNNEL_SPEC=\"$3\" exec '{}' --exact tunnel::tests::tunnel_process\n",
        me.display()
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    program
}

#[test]
fn a_tunnel_is_its_own_process_found_again_and_its_death_ends_both_streams_at_once() {
    let pair = destination(|_| {});
    let a = pair.source();
    let running = spawn(&a, &tunnel_program(pair.dir.path())).unwrap();
    let (mut near, mut far) = pair_when_connected(&pair, &a);
    exchange(&near, &far);
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(running.process().pid as i32)).unwrap();
    assert_eq!(
        session.as_raw_nonzero().get(),
        running.process().pid as i32,
        "it leads its own session"
    );

    assert!(matches!(
        adopt(driver::Process {
            start_ticks: running.process().start_ticks + 1,
            ..running.process()
        }),
        Err(ProcessError::Ended(_))
    ));
    let adopted = adopt(running.process()).unwrap();
    assert!(!adopted.wait_end(Duration::ZERO).unwrap());
    exchange(&near, &far);
    until(&a, |status| status.phase == Phase::Relaying);

    adopted.kill().unwrap();
    // Cut, so neither QEMU may take it for the end: A's socket is closed, B's tunnel reports the cut.
    for end in [&mut near, &mut far] {
        match end.read(&mut [0]) {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "it stays open"),
        }
    }
    assert!(adopted.wait_end(PATIENCE).unwrap());
    assert!(matches!(adopt(running.process()), Err(ProcessError::Ended(_))));
    let outcome = pair.b_runs.join().unwrap();
    let cut = matches!(
        outcome,
        Err(TunnelError::Relay(RelayError::Truncated | RelayError::Network(_)))
    );
    assert!(cut, "{outcome:?}");
    assert!(TunnelStatus::read(&a.status_path()).unwrap().phase == Phase::Relaying);
}

/// A program that ends well, as a file of its own.
fn true_program(path: &Path) {
    let _ = std::fs::remove_file(path);
    std::fs::copy("/bin/true", path).unwrap();
}

#[test]
fn a_program_that_was_replaced_or_is_gone_is_still_started_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let side = Side::Destination {
        listen: "127.0.0.1:0".parse().unwrap(),
        incoming: dir.path().join("incoming"),
    };
    let spec = spec(dir.path(), "b", A, side);
    let path = dir.path().join("godwit");
    true_program(&path);
    let program = Program::open(&path).unwrap();
    let ends_well = || {
        let running = spawn(&spec, &program.path()).unwrap();
        let process = running.pinned();
        let mut end = [PollFd::new(process, PollFlags::IN)];
        poll(&mut end, None).unwrap();
        process.reap().and_then(|status| status.exit_status()) == Some(0)
    };
    assert!(ends_well());
    // As a package's upgrade does it: the new file takes the name.
    std::fs::copy("/bin/false", dir.path().join("new")).unwrap();
    std::fs::rename(dir.path().join("new"), &path).unwrap();
    assert!(ends_well(), "it is the program that runs, not the new one");
    std::fs::remove_file(&path).unwrap();
    assert!(ends_well(), "nor none");
    assert!(spawn(&spec, &path).is_err());
}

#[test]
fn the_program_that_runs_is_found_though_its_file_is_gone() {
    // What the agent opens: of a program whose file was replaced before it looked, the kernel still has it.
    let running = Program::open(Path::new("/proc/self/exe")).unwrap();
    let me = std::fs::metadata(std::env::current_exe().unwrap()).unwrap();
    let opened = std::fs::metadata(running.path()).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!((me.dev(), me.ino()), (opened.dev(), opened.ino()));
}

#[test]
fn a_spec_is_private_versioned_and_strict() {
    let dir = tempfile::tempdir().unwrap();
    let side = Side::Destination {
        listen: "[::1]:0".parse().unwrap(),
        incoming: "/run/x".into(),
    };
    let mut spec = spec(dir.path(), "b", A, side);
    let path = spec.write().unwrap();
    assert_eq!(TunnelSpec::read(&path).unwrap(), spec);
    assert!(!format!("{spec:?}").contains("0707"));
    spec.version = 2;
    spec.write().unwrap();
    assert!(matches!(TunnelSpec::read(&path), Err(SpecError::Version(2))));
    for bad in ["", "{}", "[]", "null", "{\"version\":1}"] {
        identity::secret_file::replace(&path, bad.as_bytes()).unwrap();
        assert!(matches!(TunnelSpec::read(&path), Err(SpecError::Malformed(_))));
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(TunnelSpec::read(&path), Err(SpecError::Read(_))));
}

/// A pair of tunnels whose source is on a leash.
fn leashed() -> (Pair, TunnelSpec, JoinHandle<Result<(), TunnelError>>) {
    let pair = destination(|_| {});
    let mut a = pair.source();
    let Side::Source { leash, .. } = &mut a.side else {
        unreachable!()
    };
    *leash = true;
    let a_runs = go(&a);
    until(&a, |status| status.phase == Phase::Connected);
    (pair, a, a_runs)
}

#[test]
fn a_stream_flows_only_while_its_agent_lets_it_and_to_its_end_once_it_is_free() {
    const SHORT: Duration = Duration::from_millis(100);
    let (pair, a, a_runs) = leashed();
    let (mut near, mut far) = pair.channel();
    let agent = || UnixStream::connect(a.leash_path()).unwrap();
    let mut byte = [0; 1];
    near.write_all(b"1").unwrap();
    far.set_read_timeout(Some(SHORT)).unwrap();
    assert!(far.read(&mut byte).is_err(), "nobody has said that it may flow");
    // The way back is never held.
    far.write_all(b"b").unwrap();
    near.read_exact(&mut byte).unwrap();

    let first = agent();
    (&first).write_all(&[Word::Flow as u8]).unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"1");
    // The agent dies. What is sent before the tunnel sees that comes through.
    drop(first);
    far.set_read_timeout(Some(SHORT)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        near.write_all(b"2").unwrap();
        if far.read(&mut byte).is_err() {
            break;
        }
        assert!(Instant::now() < deadline, "it flows without an agent");
    }
    let second = agent();
    (&second)
        .write_all(&[Word::Flow as u8, Word::Hold as u8, Word::Free as u8])
        .unwrap();
    drop(second);
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far.read_exact(&mut byte).unwrap();
    for _ in 0..20 {
        near.write_all(b"3").unwrap();
        far.read_exact(&mut byte).unwrap();
    }
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(far.read(&mut byte).unwrap(), 0);
    drop(far);
    a_runs.join().unwrap().unwrap();
    pair.b_runs.join().unwrap().unwrap();
}

#[test]
fn the_end_of_a_qemu_that_is_held_is_seen() {
    let (pair, _, a_runs) = leashed();
    let (mut near, mut far) = pair.channel();
    near.write_all(b"rest").unwrap();
    drop(near);
    let mut rest = vec![];
    // With the end of the process there is nothing left to hold; how the stream ends is as without a leash.
    let _ = far.read_to_end(&mut rest);
    drop(far);
    let _ = a_runs.join().unwrap();
    let _ = pair.b_runs.join().unwrap();
    assert_eq!(rest, b"rest");
}
