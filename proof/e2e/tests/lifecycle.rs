//! Every verb on real guests: what it does, in which state it leaves the VM, and what asking again does.

use anyhow::{Context, Result, bail, ensure};
use e2e::api::Api;
use e2e::fixture::{BOOT_LIMIT, HOSTS, SETTLE_LIMIT, Shared};
use e2e::run::run;
use e2e::suite;
use e2e::terminal::Terminal;
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const SAID_LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        every_verb_leaves_its_state_and_may_be_repeated,
        a_verb_in_a_wrong_state_is_refused_by_name,
        a_reboot_starts_the_guest_anew_and_keeps_its_disk,
        a_stop_presses_the_power_button_and_a_guest_that_ignores_it_is_ended,
        a_dry_run_says_where_and_why_and_does_nothing,
        a_console_takes_what_is_typed_and_shows_the_answer,
        events_are_numbered_without_gap_and_resume_where_one_left,
        operations_are_listed_shown_and_waited_for,
        a_disk_image_boots_by_firmware_on_both_machine_families,
        the_pc_family_lives_and_moves_too,
        a_paused_vm_arrives_paused,
        hosts_tell_what_they_offer_and_what_is_held,
        a_host_that_is_not_schedulable_gets_no_vm,
        names_and_ids_lead_to_the_same_vm_and_output_is_for_people_or_programs,
    ])
}

fn every_verb_leaves_its_state_and_may_be_repeated(shared: &mut Shared) -> Result<()> {
    let cluster = &shared.cluster;
    let made = cluster.json(&[
        "vm",
        "create",
        "life",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-start",
        "--wait",
    ])?;
    ensure!(done(&made) == Some("create-vm"), "create ended so: {made}");
    ensure!(
        cluster.vm("life")?.state == "inactive",
        "a VM that is not to be started was"
    );
    for (verb, state) in [
        ("start", "active"),
        ("pause", "paused"),
        ("resume", "active"),
        ("reboot", "active"),
        ("kill", "inactive"),
        ("start", "active"),
        ("stop", "inactive"),
    ] {
        // A reboot twice is two reboots; everything else is done already the second time.
        for time in ["first", "second"] {
            let operation = cluster.json(&["vm", verb, "life", "--wait"])?;
            ensure!(
                done(&operation) == Some(&format!("{verb}-vm")),
                "the {time} {verb} ended so: {operation}"
            );
            let vm = cluster.vm("life")?;
            ensure!(vm.state == state, "the {time} {verb} leaves it {}", vm.state);
            ensure!(
                vm.json["operation"].is_null(),
                "an operation that is over holds it: {}",
                vm.json
            );
        }
        if state == "active" {
            cluster.wait_http(cluster.vm("life")?.ip, BOOT_LIMIT)?;
        }
    }
    let id = cluster.vm("life")?.json["id"].as_str().context("no id")?.to_owned();
    ensure!(
        done(&cluster.json(&["vm", "delete", "life", "--wait"])?) == Some("delete-vm"),
        "it is not deleted"
    );
    let again = cluster.attempt(&["vm", "delete", "life", "--wait"])?;
    ensure!(
        again.code == Some(0),
        "deleting what is deleted ends with {:?}: {}",
        again.code,
        again.err
    );
    cluster.attempt(&["vm", "show", "life"])?.refused(4)?;
    ensure!(
        cluster.json(&["vm", "list"])? == Value::Array(vec![]),
        "a deleted VM is listed"
    );
    e2e::traces::gone(cluster.lab(), &id, SETTLE_LIMIT)
}

fn a_verb_in_a_wrong_state_is_refused_by_name(shared: &mut Shared) -> Result<()> {
    let cluster = &shared.cluster;
    cluster.json(&[
        "vm",
        "create",
        "wrong",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-start",
        "--wait",
    ])?;
    for words in [
        ["vm", "pause", "wrong"],
        ["vm", "resume", "wrong"],
        ["vm", "reboot", "wrong"],
        ["vm", "migrate", "wrong"],
        ["vm", "console", "wrong"],
    ] {
        let said = cluster.attempt(&words)?.refused(5)?;
        ensure!(
            said.contains("wrong") && said.contains("inactive"),
            "`{}` says {said}",
            words.join(" ")
        );
    }
    cluster.json(&["vm", "start", "wrong", "--wait"])?;
    cluster.json(&["vm", "pause", "wrong", "--wait"])?;
    cluster.attempt(&["vm", "start", "wrong"])?.refused(5)?;
    cluster.attempt(&["vm", "reboot", "wrong"])?.refused(5)?;
    let taken = cluster
        .attempt(&["vm", "create", "wrong", "--template", "micro"])?
        .refused(5)?;
    ensure!(taken.contains("wrong"), "a name that is taken is refused with: {taken}");
    cluster.attempt(&["vm", "start", "nobody"])?.refused(4)?;
    cluster
        .attempt(&["vm", "create", "x", "--template", "nothing"])?
        .refused(4)?;
    Ok(())
}

fn a_reboot_starts_the_guest_anew_and_keeps_its_disk(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("anew", 1)?;
    let written = guest.write_disk(4, 9)?;
    let qemu = shared.settled(&guest, 1)?;
    let before = guest.status()?;
    shared.cluster.json(&["vm", "reboot", "anew", "--wait"])?;
    let end = Instant::now() + BOOT_LIMIT;
    let again = || guest.status_within(Duration::from_secs(1));
    while again().is_ok_and(|now| now.follows(&before).is_ok()) {
        ensure!(Instant::now() < end, "the guest was not reset");
    }
    let after = shared.guest("anew")?.status()?;
    ensure!(
        after.uptime_ms < before.uptime_ms + 60_000 && after.ticks < before.ticks + 60_000,
        "{before:?}, then {after:?}"
    );
    ensure!(shared.settled(&guest, 1)? == qemu, "a reset took another QEMU");
    ensure!(guest.check_disk()? == written, "a reset changed the disk");
    shared.cluster.json(&["vm", "kill", "anew", "--wait"])?;
    shared.cluster.json(&["vm", "start", "anew", "--wait"])?;
    let guest = shared.guest("anew")?;
    ensure!(guest.check_disk()? == written, "a start changed the disk");
    Ok(())
}

fn a_stop_presses_the_power_button_and_a_guest_that_ignores_it_is_ended(shared: &mut Shared) -> Result<()> {
    shared.create("button", 2)?;
    let began = Instant::now();
    shared
        .cluster
        .json(&["vm", "stop", "button", "--grace", "60", "--wait"])?;
    ensure!(
        began.elapsed() < Duration::from_secs(50),
        "the guest did not answer its power button"
    );
    ensure!(
        shared.cluster.vm("button")?.state == "inactive",
        "a stopped VM is not inactive"
    );
    // A disk without a system has nobody who could listen to a button.
    import(shared, "deaf")?;
    shared.cluster.json(&[
        "vm",
        "create",
        "deaf",
        "--template",
        "deaf",
        "--memory",
        "64M",
        "--wait",
    ])?;
    let began = Instant::now();
    shared.cluster.json(&["vm", "stop", "deaf", "--grace", "2", "--wait"])?;
    ensure!(
        began.elapsed() >= Duration::from_secs(2),
        "a guest was ended before its grace was over"
    );
    ensure!(
        shared.cluster.vm("deaf")?.state == "inactive",
        "a stopped VM is not inactive"
    );
    shared.cluster.json(&["vm", "delete", "deaf", "--wait"])?;
    shared.cluster.json(&["template", "delete", "deaf", "--wait"]).map(drop)
}

fn a_dry_run_says_where_and_why_and_does_nothing(shared: &mut Shared) -> Result<()> {
    let operations = shared.cluster.json(&["op", "list"])?;
    let plan = shared
        .cluster
        .json(&["vm", "create", "plan", "--template", "micro", "--dry-run"])?;
    let chosen = plan["host_name"].as_str().context("no host is chosen")?.to_owned();
    ensure!(
        verdicts(&plan)?.len() == usize::from(HOSTS),
        "not every host is judged: {plan}"
    );
    ensure!(
        verdicts(&plan)?
            .iter()
            .any(|(name, refused)| *name == chosen && refused.is_empty()),
        "{plan}"
    );
    ensure!(
        shared.cluster.json(&["vm", "list"])? == Value::Array(vec![]),
        "a dry run made a VM"
    );
    ensure!(
        shared.cluster.json(&["op", "list"])? == operations,
        "a dry run began an operation"
    );
    let people = shared
        .cluster
        .cli(&["vm", "create", "plan", "--template", "micro", "--dry-run"])?;
    ensure!(
        (1..=HOSTS).all(|n| people.contains(&format!("h{n}"))),
        "people are not told of each host: {people}"
    );
    let guest = shared.create("plan", 1)?;
    let plan = shared.cluster.json(&["vm", "migrate", "plan", "--dry-run"])?;
    let here = verdicts(&plan)?
        .into_iter()
        .find(|(name, _)| name == "h1")
        .context("its own host is not judged")?;
    ensure!(
        here.1.concat().contains("already"),
        "its own host is not refused by name: {plan}"
    );
    ensure!(plan["host_name"] != "h1" && !plan["host_name"].is_null(), "{plan}");
    shared.settled(&guest, 1).map(drop)
}

fn a_console_takes_what_is_typed_and_shows_the_answer(shared: &mut Shared) -> Result<()> {
    shared.create("talk", 1)?;
    let mut terminal = Terminal::start(&mut shared.cluster.command(&["vm", "console", "talk"]))?;
    terminal.wait_for("Ctrl-]", SAID_LIMIT)?;
    terminal.type_in("\r")?;
    terminal.wait_for("# ", SAID_LIMIT)?;
    terminal.type_in("echo answer-$((6 * 7))\r")?;
    terminal.wait_for("answer-42", SAID_LIMIT)?;
    terminal.type_in("\u{1d}")?;
    ensure!(
        terminal.wait_end(SAID_LIMIT)?.success(),
        "Ctrl-] does not end the console well"
    );
    // The guest's shell is as it was left; now two look at it at once, one of them a script.
    let mut script = Terminal::piped(&mut shared.cluster.command(&["vm", "console", "talk"]))?;
    let mut other = Terminal::start(&mut shared.cluster.command(&["vm", "console", "talk"]))?;
    other.wait_for("Ctrl-]", SAID_LIMIT)?;
    script.type_in("echo again-$((6 * 9))\r")?;
    script.wait_for("again-54", SAID_LIMIT)?;
    other.wait_for("again-54", SAID_LIMIT)?;
    shared
        .cluster
        .json(&["vm", "migrate", "talk", "--to", "h2", "--wait"])?;
    let mut there = Terminal::piped(&mut shared.cluster.command(&["vm", "console", "talk"]))?;
    there.type_in("echo there-$((6 * 8))\r")?;
    there.wait_for("there-48", SAID_LIMIT)?;
    Ok(())
}

fn events_are_numbered_without_gap_and_resume_where_one_left(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let events = api.events(None)?;
    // From a known event on: nothing tells when a command that was just started has come to the server.
    let known = shared.cluster.cli(&["events", "-o", "json"])?;
    let known: Value = serde_json::from_str(known.lines().last().context("no event at all")?)?;
    let known = known["data"]["sequence"].to_string();
    let words = ["events", "--follow", "--after", &known, "-o", "json"];
    let mut follow = Terminal::piped(&mut shared.cluster.command(&words))?;
    shared.cluster.json(&[
        "vm",
        "create",
        "told",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-start",
        "--wait",
    ])?;
    let first = events.notice(SAID_LIMIT, "vm.created", "told")?;
    let from = first.id.context("a notice without a number")?;
    shared.cluster.json(&["vm", "start", "told", "--wait"])?;
    events.notice(SAID_LIMIT, "vm.active", "told")?;
    shared.cluster.json(&["vm", "delete", "told", "--wait"])?;
    let last = events
        .notice(SAID_LIMIT, "vm.deleted", "told")?
        .id
        .context("a notice without a number")?;
    follow.wait_for("\"vm.deleted\"", SAID_LIMIT)?;
    // Who lost the connection after the first sees each of the others, once and in order.
    let resumed = api.events(Some(from))?;
    for expected in from + 1..=last {
        let event = resumed.wait(SAID_LIMIT, |event| event.kind == "notice")?;
        ensure!(
            event.id == Some(expected),
            "event {:?} came instead of {expected}",
            event.id
        );
        ensure!(
            event.data["sequence"] == expected,
            "its data say another number: {}",
            event.data
        );
    }
    let listed = shared
        .cluster
        .cli(&["events", "--after", &from.to_string(), "-o", "json"])?;
    let listed: Vec<Value> = listed.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let what: Vec<_> = listed
        .iter()
        .filter_map(|event| event["data"]["what"].as_str())
        .collect();
    for one in ["vm.active", "operation.succeeded", "vm.deleted"] {
        ensure!(what.contains(&one), "{one} is not among {what:?}");
    }
    ensure!(
        listed
            .iter()
            .all(|event| event["data"]["sequence"].as_u64() > Some(from)),
        "older events came too"
    );
    Ok(())
}

fn operations_are_listed_shown_and_waited_for(shared: &mut Shared) -> Result<()> {
    let cluster = &shared.cluster;
    let words = [
        "vm",
        "create",
        "ops",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-wait",
    ];
    let begun = cluster.json(&words)?;
    let id = begun["id"].as_str().context("no id")?;
    ensure!(
        begun["state"]["state"] == "running",
        "an operation that was just accepted is {}",
        begun["state"]
    );
    let waited = cluster.json(&["op", "wait", id, "--timeout", "60"])?;
    ensure!(done(&waited) == Some("create-vm"), "it ended so: {waited}");
    ensure!(
        cluster.json(&["op", "show", id])? == waited,
        "show and wait do not agree"
    );
    let listed = cluster.json(&["op", "list", "--limit", "1"])?;
    ensure!(
        listed[0] == waited && listed[1].is_null(),
        "the newest operation is not first: {listed}"
    );
    cluster.attempt(&["op", "cancel", id])?.refused(5)?;
    cluster
        .attempt(&["op", "show", "0197b2a0-0000-7000-8000-000000000000"])?
        .refused(4)?;
    // A guest that is not up yet does not hear its power button.
    shared.guest("ops")?;
    let late = cluster.json(&["vm", "stop", "ops", "--grace", "60", "--no-wait"])?;
    let late = late["id"].as_str().context("no id")?;
    let ended = cluster.attempt(&["op", "wait", late, "--timeout", "0"])?;
    ensure!(
        matches!(ended.code, Some(0 | 6)),
        "waiting for no time ends with {:?}: {}",
        ended.code,
        ended.err
    );
    ensure!(done(&shared.ended(late, 60)?) == Some("stop-vm"), "it did not end well");
    Ok(())
}

fn a_disk_image_boots_by_firmware_on_both_machine_families(shared: &mut Shared) -> Result<()> {
    import(shared, "sector")?;
    for machine in ["q35", "pc"] {
        let words = [
            "vm",
            "create",
            machine,
            "--template",
            "sector",
            "--machine",
            machine,
            "--memory",
            "64M",
            "--wait",
        ];
        shared.cluster.json(&words)?;
        let layout = shared.cluster.vm(machine)?.json["layout"].clone();
        let exact = layout["machine"].as_str().unwrap_or_default();
        ensure!(
            exact.starts_with(if machine == "pc" { "pc-i440fx-" } else { "pc-q35-" }),
            "its machine is {exact}"
        );
        let mut console = Terminal::piped(&mut shared.cluster.command(&["vm", "console", machine]))?;
        let end = Instant::now() + BOOT_LIMIT;
        // It greets anew for each key; one that is pressed before it listens is lost.
        while console.type_in("x").is_ok() && console.wait_for(GREETING, Duration::from_secs(1)).is_err() {
            ensure!(Instant::now() < end, "the boot sector of {machine} does not answer");
        }
        shared.cluster.json(&["vm", "delete", machine, "--wait"])?;
    }
    shared.cluster.json(&["template", "delete", "sector", "--wait"])?;
    shared
        .cluster
        .attempt(&["template", "show", "sector"])?
        .refused(4)
        .map(drop)
}

fn the_pc_family_lives_and_moves_too(shared: &mut Shared) -> Result<()> {
    let words = [
        "vm",
        "create",
        "old",
        "--template",
        "micro",
        "--machine",
        "pc",
        "--memory",
        "256M",
        "--host",
        "h1",
        "--wait",
    ];
    shared.cluster.json(&words)?;
    let guest = shared.guest("old")?;
    let before = guest.status()?;
    shared.cluster.json(&["vm", "migrate", "old", "--to", "h3", "--wait"])?;
    shared.settled(&guest, 3)?;
    guest.status()?.follows(&before)?;
    shared
        .cluster
        .json(&["vm", "stop", "old", "--grace", "60", "--wait"])
        .map(drop)
}

fn a_paused_vm_arrives_paused(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("still", 1)?;
    let before = guest.status()?;
    shared.cluster.json(&["vm", "pause", "still", "--wait"])?;
    shared
        .cluster
        .json(&["vm", "migrate", "still", "--to", "h2", "--wait"])?;
    let vm = shared.cluster.vm("still")?;
    ensure!(
        vm.state == "paused" && vm.host.as_deref() == Some("h2"),
        "it is {} on {:?}",
        vm.state,
        vm.host
    );
    ensure!(
        guest.status_within(Duration::from_secs(1)).is_err(),
        "a paused guest answers"
    );
    shared.cluster.json(&["vm", "resume", "still", "--wait"])?;
    shared.settled(&guest, 2)?;
    guest.status()?.follows(&before)
}

fn hosts_tell_what_they_offer_and_what_is_held(shared: &mut Shared) -> Result<()> {
    let held = |n: u8| -> Result<(u64, u64)> {
        let host = shared.cluster.json(&["host", "show", &format!("h{n}")])?;
        ensure!(host["status"]["link"] == "up", "h{n} is not up: {host}");
        let number = |value: &Value| value.as_u64().with_context(|| format!("h{n} lacks something: {host}"));
        ensure!(
            number(&host["memory_mib"]["offered"])? > 256,
            "h{n} offers nothing: {host}"
        );
        ensure!(number(&host["status"]["facts"]["cpus"])? > 0, "h{n} has no CPU: {host}");
        ensure!(
            host["status"]["facts"]["pools"]
                .as_array()
                .is_some_and(|pools| pools.len() == 2),
            "{host}"
        );
        Ok((number(&host["vms"])?, number(&host["memory_mib"]["used"])?))
    };
    let listed = shared.cluster.json(&["host", "list"])?;
    let names: Vec<_> = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|host| host["name"].as_str())
        .collect();
    ensure!(names == ["h1", "h2", "h3"], "the hosts are {names:?}");
    ensure!(held(1)? == (0, 0), "an empty host holds {:?}", held(1)?);
    shared.create("held", 1)?;
    ensure!(held(1)? == (1, 256), "a host with one VM holds {:?}", held(1)?);
    shared
        .cluster
        .json(&["vm", "migrate", "held", "--to", "h2", "--wait"])?;
    ensure!(
        (held(1)?, held(2)?) == ((0, 0), (1, 256)),
        "after a move they hold {:?} and {:?}",
        held(1)?,
        held(2)?
    );
    shared.cluster.attempt(&["host", "remove", "h2"])?.refused(5)?;
    Ok(())
}

fn a_host_that_is_not_schedulable_gets_no_vm(shared: &mut Shared) -> Result<()> {
    let set = |n: u8, to: &str| {
        shared
            .cluster
            .json(&["host", "set", &format!("h{n}"), "--schedulable", to])
    };
    set(1, "false")?;
    set(2, "false")?;
    let plan = shared
        .cluster
        .json(&["vm", "create", "where", "--template", "micro", "--dry-run"]);
    let named = shared
        .cluster
        .attempt(&["vm", "create", "where", "--template", "micro", "--host", "h1"]);
    set(1, "true")?;
    set(2, "true")?;
    let plan = plan?;
    ensure!(plan["host_name"] == "h3", "a VM would go to {}", plan["host_name"]);
    ensure!(
        verdicts(&plan)?
            .iter()
            .filter(|(_, refused)| !refused.is_empty())
            .count()
            == 2,
        "{plan}"
    );
    named?.refused(1).map(drop)
}

fn names_and_ids_lead_to_the_same_vm_and_output_is_for_people_or_programs(shared: &mut Shared) -> Result<()> {
    let cluster = &shared.cluster;
    cluster.json(&[
        "vm",
        "create",
        "both",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-start",
        "--wait",
    ])?;
    let by_name = cluster.vm("both")?;
    let id = by_name.json["id"].as_str().context("no id")?;
    ensure!(
        cluster.vm(id)?.json == by_name.json,
        "name and id lead to different VMs"
    );
    let table = cluster.cli(&["vm", "list"])?;
    ensure!(
        table.contains("NAME") && table.contains("both") && !table.contains(id),
        "for people: {table}"
    );
    let wide = cluster.cli(&["vm", "list", "-o", "wide"])?;
    ensure!(wide.contains(id), "for people who want all: {wide}");
    let yaml = cluster.cli(&["vm", "show", "both", "-o", "yaml"])?;
    ensure!(yaml.contains("name: both"), "as YAML: {yaml}");
    let script = cluster.cli(&["completion", "bash"])?;
    ensure!(script.contains("godwit"), "the completion script does not name godwit");
    Ok(())
}

/// The operation's kind, if it succeeded.
fn done(operation: &Value) -> Option<&str> {
    (operation["state"]["state"] == "succeeded").then(|| operation["kind"]["kind"].as_str())?
}

/// Each host that a plan judges, and what speaks against it.
fn verdicts(plan: &Value) -> Result<Vec<(String, Vec<String>)>> {
    let hosts = plan["hosts"]
        .as_array()
        .with_context(|| format!("a plan without hosts: {plan}"))?;
    hosts
        .iter()
        .map(|host| {
            let Some(name) = host["name"].as_str() else {
                bail!("a host without a name: {plan}")
            };
            let refused = host["refused"].as_array().into_iter().flatten();
            Ok((
                name.to_owned(),
                refused.filter_map(|why| why.as_str().map(str::to_owned)).collect(),
            ))
        })
        .collect()
}

const GREETING: &str = "godwit boots from its disk";

/// 16-bit code that prints the text after it to the first serial port (polled 16550), once at its start and once for each byte
/// that it receives.
const BOOT_CODE: [u8; 48] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xfc, // cld
    0xbe, 0x30, 0x7c, // mov si, text
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x12, // jz wait
    0x88, 0xc4, // mov ah, al
    0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // full: in al, dx
    0xa8, 0x20, // test al, 0x20
    0x74, 0xfb, // jz full
    0x88, 0xe0, // mov al, ah
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xeb, 0xe9, // jmp next
    0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf8, // jz wait
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xbe, 0x30, 0x7c, // mov si, text
    0xeb, 0xd8, // jmp next
];

/// Makes a template of a qcow2 disk whose boot sector greets.
fn import(shared: &Shared, name: &str) -> Result<()> {
    let (raw, disk) = (
        shared.cluster.lab().dir().join("sector.raw"),
        shared.cluster.lab().dir().join("sector.qcow2"),
    );
    write_disk(&raw)?;
    let (from, to) = (raw.to_string_lossy(), disk.to_string_lossy());
    run(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    let imported = shared.cluster.json(&["template", "import", name, &to, "--wait"])?;
    ensure!(
        done(&imported) == Some("import-template"),
        "the import ended so: {imported}"
    );
    let shown = shared.cluster.json(&["template", "show", name])?;
    ensure!(shown["state"]["state"] == "ready", "the template is {}", shown["state"]);
    Ok(())
}

fn write_disk(path: &Path) -> Result<()> {
    let mut disk = vec![0; 1 << 20];
    disk[..BOOT_CODE.len()].copy_from_slice(&BOOT_CODE);
    let text = format!("{GREETING}\r\n");
    disk[BOOT_CODE.len()..BOOT_CODE.len() + text.len()].copy_from_slice(text.as_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, disk).with_context(|| format!("cannot write {}", path.display()))
}
