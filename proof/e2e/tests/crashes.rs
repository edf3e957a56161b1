//! Processes are killed, alone and in the middle of a migration: one host runs the VM, the operation ends, nothing leaks.

use anyhow::{Context, Result, ensure};
use e2e::fixture::{BOOT_LIMIT, Guest, HOSTS, SETTLE_LIMIT, Shared};
use e2e::lab::kill_process;
use e2e::load::Load;
use e2e::moving::{FROM, Moving, TO};
use e2e::suite;
use serde_json::Value;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long an agent is away: a copy that nobody holds would have ended long before.
const AWAY: Duration = Duration::from_secs(6);

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        an_agent_killed_and_restarted_leaves_its_vm_untouched,
        a_controller_killed_and_restarted_leaves_vms_untouched_and_forgets_nothing,
        all_of_godwit_killed_at_once_leaves_vms_untouched,
        the_sources_agent_killed_in_the_middle_of_a_move_ends_it_well,
        the_destinations_agent_killed_in_the_middle_of_a_move_ends_it_well,
        the_destinations_agent_away_for_a_while_makes_no_guest_stand,
        the_sources_agent_away_for_a_while_makes_no_guest_stand,
        the_controller_killed_in_the_middle_of_a_move_ends_it_well,
        all_of_godwit_killed_in_the_middle_of_a_move_ends_it_well,
        a_move_cancelled_in_its_middle_leaves_the_vm_where_it_was,
        the_destinations_qemu_killed_in_the_middle_leaves_the_vm_at_its_source,
        the_sources_tunnel_killed_in_the_middle_leaves_the_vm_at_its_source,
        the_destinations_tunnel_killed_in_the_middle_leaves_the_vm_at_its_source,
        the_sources_qemu_killed_in_the_middle_is_told_and_the_vm_starts_again,
        a_qemu_killed_in_peace_is_told_and_the_vm_starts_again,
    ])
}

fn an_agent_killed_and_restarted_leaves_its_vm_untouched(shared: &mut Shared) -> Result<()> {
    untouched(shared, |shared| {
        shared.cluster.kill_agent(FROM)?;
        shared.cluster.start_agent(FROM)
    })
}

fn a_controller_killed_and_restarted_leaves_vms_untouched_and_forgets_nothing(shared: &mut Shared) -> Result<()> {
    untouched(shared, |shared| {
        let before = shared.cluster.json(&["op", "list"])?;
        shared.cluster.kill_controller()?;
        shared.cluster.start_controller()?;
        let after = shared.cluster.json(&["op", "list"])?;
        ensure!(before == after, "operations were forgotten: {before} became {after}");
        Ok(())
    })
}

fn all_of_godwit_killed_at_once_leaves_vms_untouched(shared: &mut Shared) -> Result<()> {
    untouched(shared, all_die_and_come_back)
}

fn the_sources_agent_killed_in_the_middle_of_a_move_ends_it_well(shared: &mut Shared) -> Result<()> {
    ends_well(shared, |shared| {
        shared.cluster.kill_agent(FROM)?;
        shared.cluster.start_agent(FROM)
    })
}

fn the_destinations_agent_killed_in_the_middle_of_a_move_ends_it_well(shared: &mut Shared) -> Result<()> {
    ends_well(shared, |shared| {
        shared.cluster.kill_agent(TO)?;
        shared.cluster.start_agent(TO)
    })
}

fn the_destinations_agent_away_for_a_while_makes_no_guest_stand(shared: &mut Shared) -> Result<()> {
    runs_without(shared, TO)
}

fn the_sources_agent_away_for_a_while_makes_no_guest_stand(shared: &mut Shared) -> Result<()> {
    runs_without(shared, FROM)
}

fn the_controller_killed_in_the_middle_of_a_move_ends_it_well(shared: &mut Shared) -> Result<()> {
    ends_well(shared, |shared| {
        shared.cluster.kill_controller()?;
        shared.cluster.start_controller()
    })
}

fn all_of_godwit_killed_in_the_middle_of_a_move_ends_it_well(shared: &mut Shared) -> Result<()> {
    ends_well(shared, all_die_and_come_back)
}

fn a_move_cancelled_in_its_middle_leaves_the_vm_where_it_was(shared: &mut Shared) -> Result<()> {
    let ended = stays(shared, |shared, moving| {
        shared.cluster.cli(&["op", "cancel", &moving.operation]).map(drop)
    })?;
    ensure!(
        ended["state"]["state"] == "cancelled",
        "the operation ended so: {ended}"
    );
    Ok(())
}

fn the_destinations_qemu_killed_in_the_middle_leaves_the_vm_at_its_source(shared: &mut Shared) -> Result<()> {
    failed(&stays(shared, |shared, moving| {
        only(&moving.traces(shared, TO)?.qemu).and_then(kill_process)
    })?)
}

fn the_sources_tunnel_killed_in_the_middle_leaves_the_vm_at_its_source(shared: &mut Shared) -> Result<()> {
    failed(&stays(shared, |shared, moving| {
        only(&moving.traces(shared, FROM)?.tunnels).and_then(kill_process)
    })?)
}

fn the_destinations_tunnel_killed_in_the_middle_leaves_the_vm_at_its_source(shared: &mut Shared) -> Result<()> {
    failed(&stays(shared, |shared, moving| {
        only(&moving.traces(shared, TO)?.tunnels).and_then(kill_process)
    })?)
}

fn the_sources_qemu_killed_in_the_middle_is_told_and_the_vm_starts_again(shared: &mut Shared) -> Result<()> {
    let moving = Moving::begin(shared)?;
    only(&moving.traces(shared, FROM)?.qemu).and_then(kill_process)?;
    let ended = moving.over(shared)?;
    failed(&ended)?;
    starts_again(shared, &moving.guest)
}

fn a_qemu_killed_in_peace_is_told_and_the_vm_starts_again(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("lost", FROM)?;
    let written = guest.write_disk(8, 3)?;
    kill_process(shared.settled(&guest, FROM)?)?;
    starts_again(shared, &guest)?;
    ensure!(guest.check_disk()? == written, "the disk lost what was synced before");
    Ok(())
}

/// Kills all processes of ours, not those of guests, and starts them again.
fn all_die_and_come_back(shared: &mut Shared) -> Result<()> {
    shared.cluster.kill_controller()?;
    for n in 1..=HOSTS {
        shared.cluster.kill_agent(n)?;
    }
    shared.cluster.start_controller()?;
    (1..=HOSTS).try_for_each(|n| shared.cluster.start_agent(n))
}

/// Whatever `crash` does, the same QEMU goes on with the same guest, which misses no request, and takes orders afterwards.
fn untouched(shared: &mut Shared, crash: impl FnOnce(&mut Shared) -> Result<()>) -> Result<()> {
    let guest = shared.create("calm", FROM)?;
    guest.write_memory(8, 8)?;
    let (qemu, before) = (shared.settled(&guest, FROM)?, guest.status()?);
    let load = Load::start(&shared.cluster.lab().client_netns(), guest.ip, 50)?;
    crash(shared)?;
    let host = format!("h{FROM}");
    let up = |shared: &Shared| shared.cluster.json(&["host", "show", &host]);
    until(SETTLE_LIMIT, "the host is not up again", || {
        Ok(up(shared)?["status"]["link"] == "up")
    })?;
    ensure!(shared.settled(&guest, FROM)? == qemu, "another QEMU runs the VM");
    guest.status()?.follows(&before)?;
    let load = load.finish()?;
    // It was not moved: it never stood.
    load.holds(false)?;
    for (verb, state) in [("pause", "paused"), ("resume", "active")] {
        shared.cluster.json(&["vm", verb, &guest.name, "--wait"])?;
        ensure!(
            shared.cluster.vm(&guest.name)?.state == state,
            "the VM is not {state} after {verb}"
        );
    }
    ensure!(shared.settled(&guest, FROM)? == qemu, "another QEMU runs the VM");
    Ok(())
}

/// In the middle of a move `crash` happens; once the copy may end, the move does, and well.
fn ends_well(shared: &mut Shared, crash: impl FnOnce(&mut Shared) -> Result<()>) -> Result<()> {
    let moving = Moving::begin(shared)?;
    crash(shared)?;
    moving.let_go(shared)?;
    let ended = moving.over(shared)?;
    ensure!(
        ended["state"]["state"] == "succeeded",
        "the operation ended so: {ended}"
    );
    moving.holds(shared, TO)
}

/// The agent of host `n` is away in the middle of a move whose copy could end: the guest answers all the while, and moves once the
/// agent is back. A guest that stands for its whole copy only moves.
fn runs_without(shared: &mut Shared, n: u8) -> Result<()> {
    let stands = shared.stands_while_copied()?;
    let moving = Moving::begin(shared)?;
    shared.cluster.kill_agent(n)?;
    if !stands {
        moving.let_go(shared)?;
        let end = Instant::now() + AWAY;
        while Instant::now() < end {
            moving.guest.status()?.follows(&moving.before)?;
        }
        let move_ = shared.cluster.json(&["op", "show", &moving.operation])?;
        ensure!(
            move_["state"]["state"] == "running",
            "the move ended meanwhile: {move_}"
        );
    }
    shared.cluster.start_agent(n)?;
    if stands {
        moving.let_go(shared)?;
    }
    let ended = moving.over(shared)?;
    ensure!(
        ended["state"]["state"] == "succeeded",
        "the operation ended so: {ended}"
    );
    moving.holds(shared, TO)
}

/// In the middle of a move `fault` happens: the move ends, and the guest is where it was, as if it had not been moved; and may be
/// moved afterwards. Returns the operation.
fn stays(shared: &mut Shared, fault: impl FnOnce(&mut Shared, &Moving) -> Result<()>) -> Result<Value> {
    let moving = Moving::begin(shared)?;
    fault(shared, &moving)?;
    let ended = moving.over(shared)?;
    moving.let_go(shared)?;
    let (guest, written, before) = (moving.guest.clone(), moving.written.clone(), moving.before);
    moving.holds(shared, FROM)?;
    let again = shared
        .cluster
        .json(&["vm", "migrate", &guest.name, "--to", &format!("h{TO}"), "--wait"])?;
    ensure!(
        again["state"]["state"] == "succeeded",
        "the move afterwards ended so: {again}"
    );
    shared.settled(&guest, TO)?;
    guest.status()?.follows(&before)?;
    ensure!(
        guest.check_disk()? == written,
        "the disk has another checksum than before"
    );
    Ok(ended)
}

/// The VM is reported as failed, with a reason, and starts again with nothing left of its past.
fn starts_again(shared: &Shared, guest: &Guest) -> Result<()> {
    let vm = shared
        .cluster
        .wait_vm(&guest.name, SETTLE_LIMIT, |vm| vm.state == "failed")?;
    let reason = vm.json["status"]["reason"].as_str().unwrap_or_default();
    ensure!(!reason.is_empty(), "nobody says why the VM failed");
    e2e::traces::gone(shared.cluster.lab(), &guest.id, SETTLE_LIMIT)?;
    shared.cluster.json(&["vm", "start", &guest.name, "--wait"])?;
    shared.cluster.wait_http(guest.ip, BOOT_LIMIT)?;
    let vm = shared.cluster.vm(&guest.name)?;
    let host = (1..=HOSTS).find(|n| vm.runs_on(*n)).context("the VM runs on no host")?;
    shared.settled(guest, host).map(drop)
}

fn failed(ended: &Value) -> Result<()> {
    ensure!(ended["state"]["state"] == "failed", "the operation ended so: {ended}");
    let why = ended["state"]["reason"]["message"].as_str().unwrap_or_default();
    ensure!(
        !why.is_empty() && !why.contains('\n'),
        "the operation does not say in one line why it failed: {ended}"
    );
    Ok(())
}

fn only(pids: &[u32]) -> Result<u32> {
    match pids {
        [pid] => Ok(*pid),
        other => anyhow::bail!("one process was expected, not {other:?}"),
    }
}

fn until(limit: Duration, complaint: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    while !holds()? {
        ensure!(Instant::now() < end, "{complaint} after {} s", limit.as_secs());
        // tidy: sleep because the command line offers no event for an arbitrary condition
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
