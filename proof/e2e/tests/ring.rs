//! A VM that goes round and round between three hosts, under load, as if nothing happened.

use anyhow::{Context, Result, ensure};
use e2e::fixture::{HOSTS, Shared};
use e2e::lab::Place;
use e2e::load::Load;
use e2e::probe::Probe;
use e2e::suite;
use std::process::ExitCode;
use std::time::Duration;

const MOVES: u8 = 20;
const REQUESTS_PER_S: u32 = 100;

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        each_host_sees_its_own_files_and_the_shared_pool_alone,
        twenty_moves_in_a_ring_under_load_lose_no_request_no_page_and_no_block,
    ])
}

fn each_host_sees_its_own_files_and_the_shared_pool_alone(shared: &mut Shared) -> Result<()> {
    let lab = shared.cluster.lab();
    let read = |n: u8, path: &str| lab.run(Place::Host(n), &["cat", path]);
    let membership: Vec<String> = (1..=HOSTS)
        .map(|n| read(n, "/var/lib/godwit/membership.json"))
        .collect::<Result<_>>()?;
    ensure!(
        membership[0] != membership[1] && membership[1] != membership[2],
        "two hosts share their state directory"
    );
    let guest = shared.create("seen", 1)?;
    let sees = |n: u8, path: &str| lab.run(Place::Host(n), &["ls", path]);
    ensure!(
        sees(1, "/run/godwit")?.contains(&guest.id),
        "h1 does not see the directory of its own VM"
    );
    for n in 2..=HOSTS {
        ensure!(
            !sees(n, "/run/godwit")?.contains(&guest.id),
            "h{n} sees the sockets of a VM of h1"
        );
        ensure!(
            sees(n, "/srv/godwit/local/volumes")?.is_empty(),
            "h{n} has a volume of its own"
        );
        ensure!(
            !sees(n, "/srv/godwit/shared/volumes")?.is_empty(),
            "h{n} does not see the shared pool"
        );
        ensure!(sees(n, "/var/tmp/godwit-lab")?.is_empty(), "h{n} sees behind the lab");
    }
    Ok(())
}

fn twenty_moves_in_a_ring_under_load_lose_no_request_no_page_and_no_block(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("ring", 1)?;
    guest.write_memory(24, 12)?;
    let written = guest.write_disk(24, 7)?;
    let before = guest.status()?;
    let probe = Probe::start(&shared.cluster.lab().client_netns(), guest.ip)?;
    let calm = probe.wait_answer(Duration::from_secs(10))?;
    let load = Load::start(&shared.cluster.lab().client_netns(), guest.ip, REQUESTS_PER_S)?;
    let mut report = Vec::new();
    for step in 1..=MOVES {
        let to = step % HOSTS + 1;
        let receipt = go(shared, &guest.name, to).with_context(|| format!("move {step} of {MOVES}, to h{to}"))?;
        report.push(format!("h{to} {receipt}"));
        // Every few moves: what is on the disk, in the middle of it all.
        if step % 5 == 0 {
            ensure!(
                guest.check_disk()? == written,
                "the disk has another checksum after move {step}"
            );
        }
    }
    let to = MOVES % HOSTS + 1;
    let end = probe.wait_answer(Duration::from_secs(10))?;
    let load = load.finish()?;
    println!("    {}", report.join(", "));
    println!(
        "    longest silence {:.1} ms; {} requests, slowest {:.0} ms",
        probe.longest_gap(calm, end).ms(),
        load.sent,
        load.max_ms
    );
    load.holds(shared.stands_while_copied()?)?;
    ensure!(
        load.sent > 20 * u64::from(MOVES),
        "only {} requests were sent",
        load.sent
    );
    let after = guest.status()?;
    after.follows(&before)?;
    ensure!(after.written_mib > before.written_mib, "the memory writer stands still");
    ensure!(
        guest.check_disk()? == written,
        "the disk has another checksum than before"
    );
    shared.settled(&guest, to)?;
    Ok(())
}

/// One move; its blackout by QEMU and its time from request to running, for the report.
fn go(shared: &Shared, vm: &str, to: u8) -> Result<String> {
    let host = format!("h{to}");
    let operation = shared.cluster.json(&["vm", "migrate", vm, "--to", &host, "--wait"])?;
    ensure!(
        operation["state"]["state"] == "succeeded",
        "the operation ended so: {operation}"
    );
    ensure!(shared.cluster.vm(vm)?.runs_on(to), "{vm} does not run on {host}");
    let receipt = e2e::receipt::reported(&operation)?;
    Ok(format!(
        "{}/{} ms",
        receipt["qemu_downtime_ms"], receipt["request_to_running_ms"]
    ))
}
