//! What is sent to a guest while it stands still reaches it once it runs on, wherever that is.

use anyhow::{Context, Result, ensure};
use e2e::fixture::{Guest, Shared};
use e2e::probe::enter_netns;
use e2e::suite;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior};

/// Below the second after which Linux says again what was not answered (RFC 6298, 2): whoever is let in in time was heard at once.
const LIMIT: Duration = Duration::from_millis(950);
const EVERY: Duration = Duration::from_millis(10);
/// Whoever waited this long came while the guest stood.
const LONG: Duration = Duration::from_millis(80);
/// So many must have: else the standstill was too short to show anything.
const WAITED_MIN: usize = 5;
/// The guest writes faster than the link takes, so that it is given a standstill of some hundred milliseconds in the end: what it
/// writes anew each round, 16 MiB, takes 0.34 s.
const LINK_MBIT_PER_S: u32 = 400;
const WRITTEN_MIB: u32 = 16;
const WRITES_MIB_PER_S: u32 = 200;

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        who_calls_while_the_guest_moves_is_heard_without_calling_twice,
        who_calls_while_the_guest_stands_where_it_is_is_heard_too,
    ])
}

fn who_calls_while_the_guest_moves_is_heard_without_calling_twice(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("heard", 1)?;
    let mut waited = 0;
    for (from, to) in [(1, 2), (2, 3), (3, 1)] {
        guest.write_memory(WRITTEN_MIB, WRITES_MIB_PER_S)?;
        shared.cluster.lab().host(from)?.shape(Some(LINK_MBIT_PER_S))?;
        let callers = Callers::start(shared, &guest)?;
        let host = format!("h{to}");
        let moved = shared
            .cluster
            .json(&["vm", "migrate", &guest.name, "--to", &host, "--wait"]);
        shared.cluster.lab().host(from)?.shape(None)?;
        let operation = moved?;
        ensure!(
            operation["state"]["state"] == "succeeded",
            "the move to {host} ended so: {operation}"
        );
        waited += callers
            .finish()
            .with_context(|| format!("{host}, after a standstill of {} ms", downtime(&operation)))?;
        shared.settled(&guest, to)?;
    }
    ensure!(
        waited >= WAITED_MIN,
        "only {waited} called while the guest stood: nothing was shown"
    );
    Ok(())
}

fn who_calls_while_the_guest_stands_where_it_is_is_heard_too(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("stays", 1)?;
    let callers = Callers::start(shared, &guest)?;
    shared.cluster.json(&["vm", "pause", &guest.name, "--wait"])?;
    // As long as a standstill may be.
    callers.until_waiting(WAITED_MIN * 2, LIMIT / 2)?;
    shared.cluster.json(&["vm", "resume", &guest.name, "--wait"])?;
    let waited = callers.finish()?;
    ensure!(
        waited >= WAITED_MIN,
        "only {waited} called while the guest stood: nothing was shown"
    );
    Ok(())
}

fn downtime(operation: &Value) -> String {
    e2e::receipt::reported(operation).map_or_else(|_| "?".to_owned(), |receipt| receipt["qemu_downtime_ms"].to_string())
}

/// Callers who each open a connection, one every ten milliseconds, and call once only.
struct Callers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Option<Duration>>>>,
}

impl Callers {
    /// Begins, and waits until the first was heard.
    fn start(shared: &Shared, guest: &Guest) -> Result<Self> {
        // The guest's neighbour is known from here on: no caller waits for that.
        guest.status()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (netns, ip, stopped) = (shared.cluster.lab().client_netns(), guest.ip, Arc::clone(&stop));
        let thread = thread::spawn(move || calls(netns, ip, &stopped));
        Ok(Self { stop, thread })
    }

    /// Waits until so many can have called into the standstill.
    fn until_waiting(&self, callers: usize, at_most: Duration) -> Result<()> {
        let time = EVERY * u32::try_from(callers).context("so many callers")?;
        // tidy: sleep because what is tested is a standstill over time
        thread::sleep((LONG + time).min(at_most));
        Ok(())
    }

    /// No caller was left unheard; how many waited long.
    fn finish(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        let heard = match self.thread.join() {
            Ok(heard) => heard?,
            Err(_) => anyhow::bail!("the callers' thread panicked"),
        };
        let unheard = heard.iter().filter(|waited| waited.is_none()).count();
        let longest = heard.iter().flatten().max().copied().unwrap_or_default();
        let waited = heard.iter().flatten().filter(|waited| **waited >= LONG).count();
        println!(
            "    {} callers, {waited} waited over {} ms, the longest {} ms, {unheard} unheard",
            heard.len(),
            LONG.as_millis(),
            longest.as_millis()
        );
        ensure!(
            unheard == 0,
            "{unheard} of {} callers were not heard within {} ms",
            heard.len(),
            LIMIT.as_millis()
        );
        Ok(waited)
    }
}

/// How long each waited for its connection; `None` who was not heard.
fn calls(netns: PathBuf, ip: Ipv4Addr, stop: &AtomicBool) -> Result<Vec<Option<Duration>>> {
    enter_netns(&netns)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the callers")?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut callers = tokio::task::JoinSet::new();
        while !stop.load(Ordering::Relaxed) {
            ticks.tick().await;
            callers.spawn_local(async move {
                let began = Instant::now();
                let heard = tokio::time::timeout(LIMIT, TcpStream::connect((ip, 80))).await;
                matches!(heard, Ok(Ok(_))).then(|| began.elapsed())
            });
        }
        Ok(callers.join_all().await)
    })
}
