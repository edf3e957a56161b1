//! What the tests of the driver share: a guest that counts, hosts of one directory each, and the stream between two of them.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)] // Helpers of tests; each test program uses some.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use driver::{Action, Condition, CopyLimits, Happened, INCOMING_SOCKET, Launch, Mode, OUTGOING_SOCKET, SERIAL_SOCKET};
use model::host::Accelerator;
use model::layout::{Family, Layout};
use model::order::{VolumePlace, VolumeUse};
use model::storage::Format;
use model::template::Boot;
use model::{Definition, Millis, PoolId, VmId, VolumeId};
use qemu::{Capabilities, Given, GivenVolume, Handle, Program, Qemu, Vm, discover};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// For what should take milliseconds.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// For the test that something does not happen.
pub(crate) const WHILE: Duration = Duration::from_millis(700);

/// A boot sector that sends 0 when it starts and then a count of its timer's ticks, one byte a millisecond, from 1 to 255 and
/// from 1 again: a 0 is a boot and nothing else. It writes a page with each; `q` powers it off. It sends only when the port has
/// room, so a reader who is late loses nothing.
#[rustfmt::skip]
const TICKER: &[u8] = &[
    0xfa,                         // 00 cli
    0xfc,                         // 01 cld
    0x31, 0xc0,                   // 02 xor ax,ax
    0x8e, 0xd8,                   // 04 mov ds,ax
    0x8e, 0xc0,                   // 06 mov es,ax
    0x8e, 0xd0,                   // 08 mov ss,ax
    0xbc, 0x00, 0x7c,             // 0a mov sp,0x7c00
    0xb0, 0x34,                   // 0d mov al,0x34          timer 0: rate generator
    0xe6, 0x43,                   // 0f out 0x43,al
    0xb0, 0xa9,                   // 11 mov al,0xa9          1193 of its clocks: 1 ms
    0xe6, 0x40,                   // 13 out 0x40,al
    0xb0, 0x04,                   // 15 mov al,0x4
    0xe6, 0x40,                   // 17 out 0x40,al
    0xb8, 0x00, 0x20,             // 19 mov ax,0x2000
    0x8e, 0xc0,                   // 1c mov es,ax
    0x31, 0xff,                   // 1e xor di,di
    0x30, 0xdb,                   // 20 xor bl,bl
    0xfb,                         // 22 sti
    0xeb, 0x17,                   // 23 jmp 0x3c             0: it boots
    0xf4,                         // 25 hlt                  until the next tick
    0xba, 0xfd, 0x03,             // 26 mov dx,0x3fd
    0xec,                         // 29 in al,dx
    0xa8, 0x01,                   // 2a test al,0x1          a byte came?
    0x74, 0x08,                   // 2c je 0x36
    0xba, 0xf8, 0x03,             // 2e mov dx,0x3f8
    0xec,                         // 31 in al,dx
    0x3c, 0x71,                   // 32 cmp al,'q'
    0x74, 0x1d,                   // 34 je 0x53
    0xfe, 0xc3,                   // 36 inc bl
    0x75, 0x02,                   // 38 jne 0x3c
    0xfe, 0xc3,                   // 3a inc bl
    0x26, 0x88, 0x1d,             // 3c mov es:[di],bl
    0x81, 0xc7, 0x00, 0x10,       // 3f add di,0x1000
    0xba, 0xfd, 0x03,             // 43 mov dx,0x3fd
    0xec,                         // 46 in al,dx
    0xa8, 0x20,                   // 47 test al,0x20         room for a byte?
    0x74, 0xfb,                   // 49 je 0x46
    0x88, 0xd8,                   // 4b mov al,bl
    0xba, 0xf8, 0x03,             // 4d mov dx,0x3f8
    0xee,                         // 50 out dx,al
    0xeb, 0xd2,                   // 51 jmp 0x25
    0xba, 0x04, 0x06,             // 53 mov dx,0x604         ACPI PM1a control: sleep, S5
    0xb8, 0x00, 0x20,             // 56 mov ax,0x2000
    0xef,                         // 59 out dx,ax
    0xf4,                         // 5a hlt
];

/// The QEMU under test: the installed one, or what `GODWIT_QEMU` names.
pub(crate) async fn installed() -> (Qemu, Capabilities) {
    let program = Program::locate(std::env::var_os("GODWIT_QEMU").map(PathBuf::from).as_deref());
    let capabilities = discover(&program).await.unwrap();
    (Qemu::new(program, capabilities.clone()), capabilities)
}

/// Notes a test that cannot run here, where `cargo xtask test` counts them.
pub(crate) fn left_out(test: &str, why: &str) {
    println!("left out: {test}: {why}");
    if let Some(notes) = std::env::var_os("GODWIT_LEFT_OUT") {
        let mut notes = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(notes)
            .unwrap();
        writeln!(notes, "{test}: {why}").unwrap();
    }
}

/// Another QEMU, in the directory that `GODWIT_QEMU_ALT` names; `None` is noted as a test left out.
pub(crate) async fn other(test: &str) -> Option<(Qemu, Capabilities)> {
    let Some(directory) = std::env::var_os("GODWIT_QEMU_ALT") else {
        left_out(test, "no other QEMU (GODWIT_QEMU_ALT)");
        return None;
    };
    let program = Program::locate(Some(Path::new(&directory)));
    let capabilities = discover(&program).await.unwrap();
    Some((Qemu::new(program, capabilities.clone()), capabilities))
}

/// The user that a VM's process gets; without root there is only our own.
pub(crate) fn user() -> u32 {
    let ours = rustix::process::geteuid();
    if ours.is_root() { 64_123 } else { ours.as_raw() }
}

/// A disk that several hosts reach, and the VM on it.
pub(crate) struct Shared {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) definition: Definition,
}

impl Shared {
    pub(crate) fn new(capabilities: &Capabilities, family: Family) -> Self {
        Self::with_machine(capabilities, family, None)
    }

    pub(crate) fn with_machine(capabilities: &Capabilities, family: Family, machine: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut disk = vec![0; 1 << 20];
        disk[..TICKER.len()].copy_from_slice(TICKER);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(directory.path().join("disk.raw"), disk).unwrap();
        let mut hypervisor = capabilities.hypervisor(Accelerator::Tcg, "a test".to_owned());
        if let Some(machine) = machine {
            hypervisor.machines = BTreeMap::from([(family, machine.to_owned())]);
        }
        let volume = VolumeId(Uuid::now_v7());
        let pool = PoolId(Uuid::now_v7());
        let place = VolumePlace {
            volume,
            pool,
            format: Format::Raw,
        };
        let definition = Definition {
            template: None,
            vm: VmId(Uuid::now_v7()),
            name: "ticker".parse().unwrap(),
            layout: Layout::fix(family, &hypervisor, 1, 64, &[], &[volume]).unwrap(),
            boot: Boot::Bios,
            pool,
            volumes: vec![VolumeUse {
                place,
                size_bytes: 1 << 20,
                base: None,
            }],
            ports: vec![],
        };
        Self { directory, definition }
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.directory.path().join("disk.raw")
    }
}

/// One host's end of a VM.
pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    /// `None` while there is no agent.
    vm: Option<Vm>,
    pub(crate) handle: Handle,
}

impl Host {
    pub(crate) fn of(directory: tempfile::TempDir, vm: Vm) -> Self {
        Self {
            directory,
            handle: vm.handle(),
            vm: Some(vm),
        }
    }

    pub(crate) async fn start(qemu: &Qemu, shared: &Shared, mode: Mode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let launch = launch(shared, mode, &directory.path().join("run"));
        let vm = qemu
            .spawn(launch, given(shared, vec![]))
            .await
            .unwrap_or_else(|error| panic!("{error}: {error:?}"));
        let mut host = Self::of(directory, vm);
        let up = host.next().await;
        assert!(matches!(up, Happened::Up { .. }), "{up:?}");
        host
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    pub(crate) fn act(&self, action: Action) {
        self.handle.act(action).unwrap();
    }

    pub(crate) fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("an agent is here")
    }

    /// The agent ends, without a word.
    pub(crate) fn let_go(&mut self) {
        self.vm = None;
    }

    /// The agent ends, without a word, and another comes.
    pub(crate) async fn restart_agent(&mut self, shared: &Shared) -> Condition {
        self.vm = None;
        self.vm = Some(qemu::Vm::adopt(shared.definition.vm, &self.run_dir()).await.unwrap());
        self.handle = self.vm().handle();
        match self.next().await {
            Happened::Up { condition } => condition,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn next(&mut self) -> Happened {
        tokio::time::timeout(SOON, self.vm().next())
            .await
            .expect("in time")
            .expect("lives")
    }

    /// Everything up to and with the first that is `wanted`.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&Happened) -> bool) -> Vec<Happened> {
        let mut told = Vec::new();
        let found = async {
            while let Some(happened) = self.vm().next().await {
                let found = wanted(&happened);
                told.push(happened);
                if found {
                    return true;
                }
            }
            false
        };
        let found = tokio::time::timeout(SOON, found).await.unwrap_or(false);
        assert!(found, "not told, only: {told:#?}");
        told
    }

    /// What is told within a while, copies' progress left out.
    pub(crate) async fn tells_within(&mut self, time: Duration) -> Vec<Happened> {
        let mut told = Vec::new();
        let all = async {
            while let Some(happened) = self.vm().next().await {
                if !matches!(happened, Happened::Copying(_)) {
                    told.push(happened);
                }
            }
        };
        let _ = tokio::time::timeout(time, all).await;
        told
    }

    pub(crate) async fn run(&mut self) {
        self.act(Action::Run);
        self.until(|happened| matches!(happened, Happened::Running { .. }))
            .await;
    }

    pub(crate) async fn serial(&self) -> UnixStream {
        UnixStream::connect(self.run_dir().join(SERIAL_SOCKET)).await.unwrap()
    }

    /// Ends the process and waits for its death.
    pub(crate) async fn end(mut self) {
        // It may be dead already.
        let _ = self.handle.act(Action::Kill);
        self.until(|happened| matches!(happened, Happened::Died { .. })).await;
        qemu::clear(&self.run_dir()).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A test that failed leaves no process behind.
        let _ = self.handle.act(Action::Kill);
    }
}

pub(crate) fn launch(shared: &Shared, mode: Mode, run_dir: &Path) -> Launch {
    Launch {
        definition: shared.definition.clone(),
        mode,
        run_dir: run_dir.to_owned(),
        uid: user(),
    }
}

/// The disk of the definition, open, and taps.
pub(crate) fn given(shared: &Shared, taps: Vec<OwnedFd>) -> Given {
    Given {
        taps,
        volumes: vec![volume(&shared.disk(), None)],
        boot: None,
        seed: None,
    }
}

pub(crate) fn volume(path: &Path, base: Option<&Path>) -> GivenVolume {
    let direct = |write| {
        let options = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_DIRECT)
            .open(path);
        options.unwrap().into()
    };
    GivenVolume {
        write: direct(true),
        read: direct(false),
        base: base.map(|base| File::open(base).unwrap().into()),
    }
}

/// Reads `count` ticks.
pub(crate) async fn ticks(serial: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    tokio::time::timeout(SOON, serial.read_exact(&mut bytes))
        .await
        .expect("the guest runs")
        .unwrap();
    bytes
}

/// All that comes until nothing has come for a while.
pub(crate) async fn drain(serial: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(Ok(count @ 1..)) = tokio::time::timeout(Duration::from_millis(200), serial.read(&mut bytes)).await {
        all.extend_from_slice(&bytes[..count]);
    }
    all
}

/// Reads what the guest sends for as long as something else is waited for. A socket that nobody reads is full after some 300
/// bytes sent one by one; a byte that waits in the port then would be sent by the source and by the destination.
pub(crate) async fn reading_while<T>(serial: &mut UnixStream, waited: impl Future<Output = T>) -> (T, Vec<u8>) {
    let mut all = Vec::new();
    let mut bytes = [0; 4096];
    tokio::pin!(waited);
    loop {
        tokio::select! {
            outcome = &mut waited => return (outcome, all),
            count = serial.read(&mut bytes) => match count.unwrap() {
                0 => panic!("the serial port closed"),
                count => all.extend_from_slice(&bytes[..count]),
            },
        }
    }
}

/// Reads up to and with this byte.
pub(crate) async fn read_to(serial: &mut UnixStream, end: u8) -> Vec<u8> {
    let mut all = Vec::new();
    while all.last() != Some(&end) {
        all.extend(ticks(serial, 1).await);
    }
    all
}

/// Asserts that each tick is one more than the one before.
pub(crate) fn assert_counts(ticks: &[u8]) {
    for pair in ticks.windows(2) {
        assert_eq!(
            pair[1],
            pair[0].wrapping_add(1).max(1),
            "a tick was lost or came twice: {ticks:?}"
        );
    }
}

/// What the migration's tunnel is in production: listens for the source, connects to the destination. Aborting it cuts the stream.
pub(crate) struct Stream(JoinHandle<()>);

impl Stream {
    pub(crate) fn between(source: &Host, destination: &Host) -> Self {
        let listener = UnixListener::bind(source.run_dir().join(OUTGOING_SOCKET)).unwrap();
        let to = destination.run_dir().join(INCOMING_SOCKET);
        Self(tokio::spawn(async move {
            let (mut from, _) = listener.accept().await.unwrap();
            let mut to = UnixStream::connect(to).await.unwrap();
            // The end of either is the end of both.
            let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            let _ = to.shutdown().await;
        }))
    }

    pub(crate) fn cut(&self) {
        self.0.abort();
    }
}

/// As fast as it goes.
pub(crate) fn fast() -> CopyLimits {
    CopyLimits {
        bytes_per_s_max: None,
        downtime_max: Millis(20),
    }
}

/// So slow that it does not end within a test.
pub(crate) fn slow() -> CopyLimits {
    CopyLimits {
        bytes_per_s_max: Some(20_000),
        downtime_max: Millis(20),
    }
}
