//! The micro template on real QEMU, emulated: built once from the distribution's packages, booted by each test.

// clippy's exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used, clippy::panic)]

use image::micro::stream::{Checksum, Words};
use image::micro::{Sources, TemplateFiles, build};
use image::{Base, Pool, VolumeRequest};
use model::VolumeId;
use model::storage::Format;
use model::template::Boot;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// The template, built once a test run; packages stay unpacked from run to run.
fn template() -> &'static (PathBuf, TemplateFiles) {
    static BUILT: OnceLock<(PathBuf, TemplateFiles)> = OnceLock::new();
    BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let directory = target.join("micro-template");
        let mut steps = Vec::new();
        let sources = Sources::found(target.join("micro-cache"));
        let files = build(&directory, &sources, &mut |progress| steps.push(progress.step)).unwrap();
        assert!(steps.is_sorted() && steps.len() >= 4, "steps come in order: {steps:?}");
        (directory, files)
    })
}

/// A running guest; killed when dropped.
struct Guest {
    qemu: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    qmp: BufReader<UnixStream>,
    http_port: u16,
    echo_port: u16,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn boot(machine: &str) -> Self {
        let (template, files) = template();
        let directory = tempfile::tempdir().unwrap();
        let overlay = directory.path().join("disk.qcow2");
        let base = template.join(&files.disk.file);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(base)
            .arg(&overlay)
            .status();
        assert!(made.unwrap().success());
        let socket = directory.path().join("qmp");
        let mut qemu = qemu_command(machine, &overlay, &socket).spawn().unwrap();
        let console = qemu.stdin.take().unwrap();
        let lines = lines(qemu.stdout.take().unwrap());
        // From here on a failed assertion must not leave QEMU behind.
        let unfinished = Killed(Some(qemu));
        expect_line(&lines, "serves on port 80");
        let qmp = UnixStream::connect(&socket).unwrap();
        qmp.set_read_timeout(Some(PATIENCE)).unwrap();
        let qemu = unfinished.keep();
        let mut guest = Guest {
            qemu,
            console,
            lines,
            qmp: BufReader::new(qmp),
            http_port: 0,
            echo_port: 0,
            _directory: directory,
        };
        guest.qmp("qmp_capabilities", serde_json::json!({}));
        let network = guest.qmp(
            "human-monitor-command",
            serde_json::json!({"command-line": "info usernet"}),
        );
        (guest.http_port, guest.echo_port) = (forwarded(&network, "TCP"), forwarded(&network, "UDP"));
        guest
    }

    /// Runs a QMP command and returns its result, events skipped.
    fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let request = serde_json::json!({"execute": command, "arguments": arguments});
        self.qmp.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            self.qmp.read_line(&mut line).unwrap();
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(result) = answer.get_mut("return") {
                return result.take();
            }
        }
    }

    /// One request on its own connection: status line and body.
    fn request(&self, method: &str, target: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http_port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "{method} {target} HTTP/1.1\r\nHost: web1\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        (head.lines().next().unwrap().to_string(), answer.split_off(end + 4))
    }

    /// The JSON answer of a request that must succeed.
    fn json(&self, method: &str, target: &str) -> Value {
        let (status, body) = self.request(method, target);
        assert_eq!(
            status,
            "HTTP/1.1 200 OK",
            "{target}: {}",
            String::from_utf8_lossy(&body)
        );
        serde_json::from_slice(&body).unwrap()
    }

    /// Repeats `GET /status` until `done` says so.
    fn status_when(&self, done: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.json("GET", "/status");
            if done(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{status}");
        }
    }

    /// Waits for QEMU to end by itself.
    fn ended(mut self) {
        while self.lines.recv_timeout(PATIENCE).is_ok() {}
        assert!(self.qemu.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// QEMU's command line for a guest of the template on `overlay`.
fn qemu_command(machine: &str, overlay: &Path, socket: &Path) -> Command {
    let (template, files) = template();
    let words = "godwit.ip=10.0.2.15/24 godwit.gw=10.0.2.2 godwit.name=web1 godwit.mtu=1400";
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-nodefaults",
        "-accel",
        "tcg",
        "-m",
        "160",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-M",
        machine,
    ])
    .args([
        "-netdev",
        "user,id=n,hostfwd=tcp:127.0.0.1:0-:80,hostfwd=udp:127.0.0.1:0-:7",
    ])
    .args([
        "-device",
        "virtio-net-pci,netdev=n",
        "-device",
        "virtio-blk-pci,drive=d",
    ])
    .args(["-append", &format!("{} {words}", files.command_line)])
    .arg("-kernel")
    .arg(template.join(&files.kernel.file))
    .arg("-initrd")
    .arg(template.join(&files.initrd.file))
    .args([
        "-drive",
        &format!("file={},format=qcow2,if=none,id=d", overlay.display()),
    ])
    .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
    .stdin(Stdio::piped())
    .stdout(Stdio::piped());
    qemu
}

/// Kills the process unless it is kept.
struct Killed(Option<Child>);

impl Killed {
    fn keep(mut self) -> Child {
        self.0.take().unwrap()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(process) = &mut self.0 {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// The console line by line, ended by the console's end.
fn lines(console: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(console);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            if sender
                .send(String::from_utf8_lossy(&line).trim_end().to_string())
                .is_err()
            {
                break;
            }
            line.clear();
        }
    });
    receiver
}

fn expect_line(lines: &Receiver<String>, wanted: &str) {
    let mut seen = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(wanted) => return,
            Ok(line) => seen.push(line),
            Err(error) => panic!("no {wanted:?} on the console ({error}):\n{}", seen.join("\n")),
        }
    }
}

/// The host's port of a forwarding in `info usernet`: `UDP[HOST_FORWARD] 12 127.0.0.1 40001 10.0.2.15 7 0 0`.
fn forwarded(usernet: &Value, protocol: &str) -> u16 {
    let text = usernet.as_str().unwrap();
    let wanted = format!("{protocol}[HOST_FORWARD]");
    let line = text.lines().find(|line| line.trim().starts_with(&wanted)).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

#[test]
fn the_guest_serves_and_proves_its_time_memory_and_disk_and_the_power_button_ends_it() {
    let mut guest = Guest::boot("q35");
    let (_, page) = guest.request("GET", "/");
    assert!(String::from_utf8(page).unwrap().contains("<h1>web1</h1>"));
    let first = guest.json("GET", "/status");
    assert_eq!(first["name"], "web1");

    let later = guest.status_when(|status| status["ticks"].as_u64() > first["ticks"].as_u64());
    assert!(later["counter"].as_u64() > first["counter"].as_u64());
    assert!(
        later["largest_gap_us"].as_u64() >= Some(1000),
        "a tick is never early: {later}"
    );
    guest.json("POST", "/gap/reset");
    assert!(guest.json("GET", "/status")["gap_since"].as_u64() > Some(0));

    downloads_carry_their_checksum(&guest);
    memory_is_rewritten_at_the_set_rate_and_verified(&guest);
    disk_holds_what_was_written(&guest);
    nonsense_is_refused_and_the_server_lives_on(&guest);
    echo_counts(&guest, later["counter"].as_u64().unwrap());

    guest.console.write_all(b"\n").unwrap();
    guest
        .console
        .write_all(b"cat /sys/class/net/eth0/mtu; hostname; echo $((6*7))\n")
        .unwrap();
    for expected in ["1400", "web1", "42"] {
        expect_line(&guest.lines, expected);
    }
    guest.qmp("system_powerdown", serde_json::json!({}));
    expect_line(&guest.lines, "power button pressed");
    guest.ended();
}

fn downloads_carry_their_checksum(guest: &Guest) {
    let (_, body) = guest.request("GET", "/download?kib=300&seed=9");
    let (data, sum) = body.split_at(300 * 1024 - 8);
    let mut checksum = Checksum::default();
    // Pieces of an odd length: the network cuts where it likes.
    data.chunks(1021).for_each(|piece| checksum.update(piece));
    assert_eq!(sum, checksum.value().to_le_bytes());
    let mut expected = vec![0; data.len()];
    Words::new(9).fill(&mut expected);
    assert!(data == expected, "the stream of a seed is the same on both sides");
    let (refused, reason) = guest.request("GET", "/download?mib=99999999999");
    assert!(refused.contains("400") && !reason.is_empty());
}

fn memory_is_rewritten_at_the_set_rate_and_verified(guest: &Guest) {
    guest.json("POST", "/memory?mib=4&rate_mib_s=0");
    let fast = guest.status_when(|status| status["memory_writer"]["passes"].as_u64() >= Some(3));
    assert_eq!(fast["memory_writer"]["mismatches"], 0);
    guest.json("POST", "/memory?mib=4&rate_mib_s=2");
    // The writer counts a batch of a quarter MiB before it waits for that batch's time: 2 MiB show after 0.875 s.
    let slow = guest.status_when(|status| status["memory_writer"]["written_mib"].as_u64() >= Some(2));
    assert!(
        slow["uptime_ms"].as_u64().unwrap() - fast["uptime_ms"].as_u64().unwrap() >= 870,
        "{fast} {slow}"
    );
    guest.json("POST", "/memory?mib=0");
    assert_eq!(guest.json("GET", "/status")["memory_writer"]["mib"], 0);
    let (refused, reason) = guest.request("POST", "/memory?mib=4096");
    assert!(refused.contains("400") && String::from_utf8(reason).unwrap().contains("to spare"));
}

fn disk_holds_what_was_written(guest: &Guest) {
    let (nothing, _) = guest.request("GET", "/disk/check");
    assert!(nothing.contains("400"), "nothing was written yet");
    let written = guest.json("POST", "/disk/write?mib=8&seed=77");
    let checked = guest.json("GET", "/disk/check");
    assert_eq!(checked["ok"], true);
    assert_eq!(checked["checksum"], written["checksum"]);
    let mut expected = vec![0; 8 << 20];
    Words::new(77).fill(&mut expected);
    let mut checksum = Checksum::default();
    checksum.update(&expected);
    assert_eq!(checked["checksum"], format!("{:016x}", checksum.value()));
    let (refused, _) = guest.request("POST", "/disk/write?mib=64");
    assert!(refused.contains("400"), "64 MiB and the header do not fit");
}

fn nonsense_is_refused_and_the_server_lives_on(guest: &Guest) {
    let long = format!("/{}", "a".repeat(9000));
    for target in [
        long.as_str(),
        "/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: ",
        "/ HTTP/1.1\r\nContent-Length: -1\r\nX: ",
    ] {
        assert!(guest.request("GET", target).0.contains("400"));
    }
    assert!(guest.request("GET", "/nowhere").0.contains("404"));
}

fn echo_counts(guest: &Guest, mut last: u64) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..5 {
        socket.send_to(b"probe", ("127.0.0.1", guest.echo_port)).unwrap();
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).unwrap();
        assert_eq!((length, &answer[..5]), (13, b"probe".as_slice()));
        let counter = u64::from_be_bytes(answer[5..13].try_into().unwrap());
        assert!(counter > last);
        last = counter;
    }
}

#[test]
fn a_panic_reboots_the_guest_and_its_disk_is_still_right() {
    let mut guest = Guest::boot("pc");
    guest.json("POST", "/disk/write?mib=2&seed=3");
    guest.request("POST", "/power?action=panic");
    expect_line(&guest.lines, "serves on port 80");
    assert_eq!(guest.json("GET", "/disk/check")["ok"], true);
    // A write past the guest's back is a mismatch, not an error.
    let corrupted = guest.qmp(
        "human-monitor-command",
        serde_json::json!({"command-line": "qemu-io d \"write -P 0x55 1M 4k\""}),
    );
    assert!(corrupted.as_str().is_some());
    let check = guest.json("GET", "/disk/check");
    assert_eq!(
        (&check["ok"], &check["first_bad_byte"]),
        (&Value::Bool(false), &Value::from((1 << 20) - 4096))
    );
    guest.request("POST", "/power?action=off");
    guest.ended();
}

#[test]
fn the_manifest_is_read_back_and_notices_a_changed_file() {
    let (directory, files) = template();
    assert_eq!(&TemplateFiles::load(directory).unwrap(), files);
    files.verify(directory).unwrap();
    let copy = tempfile::tempdir().unwrap();
    for artifact in files.artifacts() {
        std::fs::copy(directory.join(&artifact.file), copy.path().join(&artifact.file)).unwrap();
    }
    files.verify(copy.path()).unwrap();
    std::fs::OpenOptions::new()
        .append(true)
        .open(copy.path().join(&files.disk.file))
        .unwrap()
        .write_all(b"x")
        .unwrap();
    assert!(
        files
            .verify(copy.path())
            .unwrap_err()
            .to_string()
            .contains(&files.disk.file)
    );
    let text = std::fs::read_to_string(directory.join("manifest.json")).unwrap();
    std::fs::write(
        copy.path().join("manifest.json"),
        text.replace("\"vmlinuz\"", "\"../vmlinuz\""),
    )
    .unwrap();
    assert!(
        TemplateFiles::load(copy.path())
            .unwrap_err()
            .to_string()
            .contains("outside")
    );
}

#[test]
fn a_stored_template_is_three_blobs_and_its_disk_a_base_for_overlays() {
    let (directory, files) = template();
    let root = tempfile::tempdir().unwrap();
    let pool = Pool::open(root.path()).unwrap();
    files.store(directory, &pool).unwrap();
    files.store(directory, &pool).unwrap();
    assert_eq!(pool.blobs().unwrap().len(), 3);
    let content = files.content();
    let Boot::Direct { kernel, .. } = &content.boot else {
        panic!("{:?}", content.boot)
    };
    assert!(pool.blob_is_intact(kernel.digest).unwrap());
    let disk = content.disk.unwrap();
    let base = Some(Base {
        digest: disk.blob.digest,
        format: disk.format,
    });
    let id = VolumeId(uuid::Uuid::from_u128(1));
    let request = VolumeRequest {
        id,
        format: Format::Qcow2,
        size_bytes: disk.size_bytes,
        base,
    };
    pool.create_volume(&request).unwrap();
}

#[test]
fn a_failed_build_leaves_what_was_there_before() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("template");
    let sources = Sources {
        busybox: Some("/does/not/exist".into()),
        ..Sources::found(directory.path().join("cache"))
    };
    let sources = Sources {
        kernel: Some(("/etc/hostname".into(), "/".into())),
        ..sources
    };
    build(&target, &sources, &mut |_| ()).unwrap_err();
    assert!(!target.exists());

    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("manifest.json"), "of an earlier build").unwrap();
    build(&target, &sources, &mut |_| ()).unwrap_err();
    let names: Vec<_> = std::fs::read_dir(&target)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["manifest.json"]);
}
