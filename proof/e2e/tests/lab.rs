//! The lab keeps its promises: hosts are apart, power loss is abrupt, nothing stays behind.

use e2e::lab::{Lab, LabConfig, Place, sweep};
use e2e::probe::{Probe, now_ns};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn config(id: &str) -> LabConfig {
    LabConfig {
        hosts: 2,
        id: Some(format!("t{id}{}", std::process::id() % 1000)),
        programs: Vec::new(),
        private: Vec::new(),
    }
}

#[test]
fn hosts_share_the_pool_and_nothing_else() {
    let lab = Lab::new(&config("a")).unwrap();
    let h1 = |argv: &[&str]| lab.run(Place::Host(1), argv);
    let h2 = |argv: &[&str]| lab.run(Place::Host(2), argv);
    h1(&[
        "touch",
        "/srv/godwit/shared/both",
        "/var/lib/godwit/own",
        "/run/godwit/own",
        "/srv/godwit/local/own",
    ])
    .unwrap();
    h2(&["ls", "/srv/godwit/shared/both"]).unwrap();
    for own in ["/var/lib/godwit", "/run/godwit", "/srv/godwit/local"] {
        assert_eq!(h2(&["ls", own]).unwrap(), "", "{own} of h1 shows on h2");
    }
    assert!(
        h2(&["ls", "/var/tmp/godwit-lab"]).unwrap().is_empty(),
        "the lab's directory shows on a host"
    );
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    assert_ne!(h1(&boot).unwrap(), h2(&boot).unwrap());
    h1(&["busybox", "ping", "-c1", "-W2", &lab.hosts()[1].address().to_string()]).unwrap();
    h1(&["busybox", "ping", "-c1", "-W2", &lab.nets().underlay_ip(1).to_string()]).unwrap();
    lab.run(
        Place::Client,
        &["busybox", "ping", "-c1", "-W2", &lab.nets().vm_ip(1).to_string()],
    )
    .unwrap();
}

#[test]
fn power_loss_kills_all_of_one_host_and_a_new_boot_id_tells() {
    let lab = Lab::new(&config("b")).unwrap();
    // A process is on its host once it says something there: before that it may still be on its way into the namespaces.
    let sleeps = ["sh", "-c", "echo here; exec sleep 600"];
    let mut lost = lab.spawn(Place::Host(1), "lost", &sleeps).unwrap();
    let mut kept = lab.spawn(Place::Host(2), "kept", &sleeps).unwrap();
    for process in [&mut lost, &mut kept] {
        process.wait_line("here", Duration::from_secs(30)).unwrap();
    }
    lab.run(Place::Host(1), &["ip", "link", "add", "godwit0", "type", "bridge"])
        .unwrap();
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let before = lab.run(Place::Host(1), &boot).unwrap();
    let h1 = lab.host(1).unwrap();
    h1.power_off().unwrap();
    assert!(!lost.wait().unwrap().success());
    assert!(kept.running().unwrap());
    assert_eq!(h1.processes().unwrap(), Vec::<u32>::new());
    assert!(
        lab.run(Place::Host(1), &["ip", "link", "show", "godwit0"]).is_err(),
        "a bridge outlived the power"
    );
    h1.power_on().unwrap();
    assert_ne!(before, lab.run(Place::Host(1), &boot).unwrap());
    lab.run(
        Place::Host(1),
        &["busybox", "ping", "-c1", "-W2", &lab.nets().underlay_ip(12).to_string()],
    )
    .unwrap();
}

#[test]
fn two_labs_live_side_by_side_and_leave_nothing() {
    let one = Lab::new(&config("c")).unwrap();
    let two = Lab::new(&config("d")).unwrap();
    assert_ne!(one.nets(), two.nets());
    let (dirs, ids) = (
        [one.dir().to_owned(), two.dir().to_owned()],
        [one.id().to_owned(), two.id().to_owned()],
    );
    let sleeper = one.spawn(Place::Root, "sleeper", &["sleep", "600"]).unwrap().id();
    drop(one);
    two.run(
        Place::Host(1),
        &["busybox", "ping", "-c1", "-W2", &two.nets().underlay_ip(12).to_string()],
    )
    .unwrap();
    drop(two);
    assert!(dirs.iter().all(|dir| !dir.exists()));
    let names = Command::new("ip").args(["netns", "list"]).output().unwrap();
    let links = Command::new("ip").args(["link"]).output().unwrap();
    for id in ids {
        let mark = format!("gw{id}-");
        assert!(
            !String::from_utf8_lossy(&names.stdout).contains(&mark),
            "a namespace stayed"
        );
        assert!(
            !String::from_utf8_lossy(&links.stdout).contains(&mark),
            "an interface stayed"
        );
    }
    let state = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "a process stayed: {state}");
}

#[test]
fn a_lab_whose_owner_was_killed_is_swept_and_a_living_one_is_not() {
    let living = Lab::new(&config("e")).unwrap();
    // What an owner that was killed leaves: the same things without a held lock.
    let stale = Lab::new(&config("f")).unwrap();
    let dir = stale.dir().to_owned();
    let id = stale.id().to_owned();
    std::fs::remove_file(dir.join("lock")).unwrap();
    assert_eq!(sweep().unwrap(), vec![id.clone()]);
    assert!(!dir.exists());
    assert!(!Path::new("/run/netns").join(format!("gw{id}-h1")).exists());
    assert!(living.dir().exists());
    living.run(Place::Host(1), &["true"]).unwrap();
}

#[test]
fn the_probe_sees_a_cut_cable_as_a_gap() {
    let lab = Lab::new(&config("g")).unwrap();
    let target = lab.nets().vm_ip(20);
    lab.run(
        Place::Host(1),
        &["ip", "addr", "add", &format!("{target}/24"), "dev", "vm0"],
    )
    .unwrap();
    let probe = Probe::start(&lab.client_netns(), target).unwrap();
    probe.wait_answer(Duration::from_secs(30)).unwrap();
    let h1 = lab.host(1).unwrap();
    h1.cut().unwrap();
    // An answer that was under way comes in; nothing after that until the cable is back.
    let cut = now_ns();
    // tidy: sleep because the length of the cut is what is measured
    std::thread::sleep(Duration::from_millis(100));
    let back = now_ns();
    h1.heal().unwrap();
    let to = probe.wait_answer(Duration::from_secs(30)).unwrap();
    let gap = probe.longest_gap(cut, back);
    assert!(gap.ms() >= 90.0 && gap.to_ns >= back, "{gap:?}");
    assert!(gap.to_ns <= to, "the answers after the cut end it: {gap:?}");
}
