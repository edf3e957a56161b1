//! Life on one host: every order does what it says, also when the agent dies before any one of its effects, and when the host reboots.

mod machine;

use driver::Condition;
use machine::{Machine, order, place, start};
use model::{
    Millis,
    order::{Happening, OffCause, Verb, VmOrder},
};

/// A machine on which these orders, all but the last, were carried out.
fn after(verbs: &[Verb]) -> Machine {
    let mut machine = Machine::new(0);
    for (revision, verb) in (1..).zip(verbs) {
        machine.order(order(1, revision, verb.clone()));
        machine.settle();
    }
    machine
}

fn stop() -> Verb {
    Verb::Stop { grace: Millis(1000) }
}

fn remove() -> Verb {
    Verb::Remove { volumes: vec![place()] }
}

fn off(seen: &Happening) -> bool {
    matches!(seen, Happening::Off { .. })
}

/// Each order with those before it, what is seen afterwards, and what the process does.
fn scenarios() -> Vec<(Vec<Verb>, Happening, Option<Condition>)> {
    let ordered = Happening::Off {
        cause: OffCause::Ordered,
    };
    let (running, standing) = (Some(Condition::Running), Some(Condition::Standing));
    vec![
        (vec![start()], Happening::Running, running),
        (vec![start(), stop()], ordered.clone(), None),
        (vec![start(), Verb::Kill], ordered, None),
        (vec![start(), Verb::Reboot], Happening::Running, running),
        (vec![start(), Verb::Pause], Happening::Paused, standing),
        (vec![start(), Verb::Pause, Verb::Resume], Happening::Running, running),
        (vec![start(), Verb::Pause, remove()], Happening::Removed, None),
        (vec![start(), stop(), start()], Happening::Running, running),
        (vec![start(), stop(), remove()], Happening::Removed, None),
    ]
}

#[test]
fn each_order_does_what_it_says() {
    for (verbs, seen, process) in scenarios() {
        let machine = after(&verbs);
        assert_eq!(machine.process, process, "{verbs:?}");
        assert!(
            machine.seen() == seen || off(&seen) && off(&machine.seen()),
            "{:?} after {verbs:?}",
            machine.seen()
        );
        assert_eq!(machine.disk, seen != Happening::Removed);
        assert_eq!(machine.residue, process.is_some(), "something is left after {verbs:?}");
    }
}

#[test]
fn an_order_is_carried_out_once_and_answered_again_from_the_journal() {
    for (verbs, ..) in scenarios() {
        let mut machine = after(&verbs);
        let (effects, resets) = (machine.effects, machine.resets);
        let answers = machine.reports.len();
        let last = u64::try_from(verbs.len()).expect("few");
        machine.order(order(1, last, verbs.last().expect("some").clone()));
        machine.settle();
        assert_eq!((machine.effects, machine.resets), (effects + 1, resets), "{verbs:?}");
        assert_eq!(machine.reports.len(), answers + 1, "{verbs:?} is answered again");
    }
}

/// The agent dies before effect `n` of the last order, comes back, and the controller sends the order again. `false` when there are fewer
/// effects.
fn dies_before(n: u32, rebooted: bool, verbs: &[Verb]) -> Option<Machine> {
    let (last, before) = verbs.split_last().expect("some");
    let mut machine = after(before);
    machine.dies_in = Some(n);
    let again: VmOrder = order(1, u64::try_from(verbs.len()).expect("few"), last.clone());
    machine.order(again.clone());
    machine.settle();
    if machine.task.is_some() {
        return None;
    }
    machine.restart(rebooted);
    machine.settle();
    machine.order(again);
    machine.settle();
    Some(machine)
}

#[test]
fn a_dead_agent_does_not_keep_an_order_from_being_done() {
    for (verbs, seen, process) in scenarios() {
        let mut points = 0;
        while let Some(machine) = dies_before(points, false, &verbs) {
            assert_eq!(machine.process, process, "{verbs:?}, dead before effect {points}");
            assert!(
                machine.seen() == seen || off(&seen) && off(&machine.seen()),
                "{verbs:?}, dead before effect {points}"
            );
            assert_eq!(
                machine.disk,
                seen != Happening::Removed,
                "{verbs:?}, dead before effect {points}"
            );
            assert_eq!(
                machine.residue,
                process.is_some(),
                "{verbs:?}, dead before effect {points}: something is left"
            );
            points += 1;
        }
        assert!(points >= 2, "{verbs:?} has only {points} effects");
    }
}

#[test]
fn a_host_that_lost_power_has_the_vm_off_and_says_so() {
    for (verbs, seen, _) in scenarios() {
        let mut points = 0;
        while let Some(machine) = dies_before(points, true, &verbs) {
            // An order that it had not seen before is carried out on what the reboot left; a start then runs.
            let runs = matches!(verbs.last(), Some(Verb::Start { .. })) && machine.process == Some(Condition::Running);
            let at = format!("{verbs:?}, no power before effect {points}: {:?}", machine.seen());
            assert!(runs || machine.process.is_none() && !machine.residue, "{at}");
            assert!(
                runs || off(&machine.seen()) || machine.seen() == Happening::Removed,
                "{at}"
            );
            assert!(!machine.disk || seen != Happening::Removed, "{at}");
            points += 1;
        }
    }
}

#[test]
fn a_guest_that_does_not_heed_the_button_is_ended_after_its_grace() {
    let mut machine = after(&[start()]);
    machine.heeds = false;
    machine.order(order(1, 2, stop()));
    machine.settle();
    assert_eq!(machine.process, None);
    assert!(off(&machine.seen()));
}

#[test]
fn a_guest_that_is_powering_off_keeps_its_grace_when_the_agent_is_restarted() {
    for paused in [false, true] {
        let mut machine = after(&[start()]);
        if paused {
            machine.order(order(1, 2, Verb::Pause));
            machine.settle();
        }
        machine.heeds = false;
        machine.order(order(1, 3, stop()));
        while machine.turn() {}
        machine.task = None;
        machine.inputs.clear();
        machine.timers.clear();
        machine.restart(false);
        assert!(!ends(&machine), "it is not ended though it does not answer yet");
        assert_eq!(machine.seen(), Happening::Running, "nobody may take it for off");
        while machine.turn() {}
        assert_eq!(machine.process, Some(Condition::Running), "its time is not over");
        // It powers off at last, in its own time.
        let mut heeding = after(&[start()]);
        heeding.heeds = false;
        heeding.order(order(1, 2, stop()));
        while heeding.turn() {}
        heeding.task = None;
        heeding.heeds = true;
        heeding.restart(false);
        while heeding.turn() {}
        assert!(heeding.process.is_none() && off(&heeding.seen()), "it is asked again");
        // Or it does not, and its time is over once more; a restart then changes nothing.
        assert!(machine.timer());
        machine.clings = 1;
        machine.turn();
        assert!(!machine.timers.contains(&task::Timer::Grace));
        machine.task = None;
        machine.restart(false);
        machine.settle();
        assert!(machine.process.is_none() && off(&machine.seen()));
    }
}

#[test]
fn the_grace_of_a_deaf_process_ends_too() {
    let mut machine = after(&[start()]);
    machine.heeds = false;
    machine.order(order(1, 2, stop()));
    while machine.turn() {}
    machine.task = None;
    machine.timers.clear();
    machine.restart(false);
    machine.inputs.clear();
    assert!(machine.timer(), "its grace is counted though it does not answer");
    machine.turn();
    assert!(ends(&machine));
}

#[test]
fn a_stop_that_an_older_agent_wrote_down_is_carried_on() {
    let machine = after(&[start()]);
    let mut written = serde_json::to_value(machine.journal.expect("a record")).expect("a value");
    written["pending"] = serde_json::json!({"pending": "end"});
    let read: task::Saved = serde_json::from_value(written).expect("it is read");
    assert_eq!(read.pending, Some(task::Pending::End { grace: None }));
}

#[test]
fn a_guest_that_powers_off_or_dies_is_told_of_with_the_cause() {
    let mut machine = after(&[start()]);
    machine
        .inputs
        .push_back(task::Input::Driver(driver::Happened::PoweredOff));
    machine.dies();
    machine.settle();
    assert_eq!(machine.reports.last(), Some(&Happening::Off { cause: OffCause::Guest }));
    let mut machine = after(&[start()]);
    machine.dies();
    machine.settle();
    assert!(matches!(
        machine.reports.last(),
        Some(Happening::Off {
            cause: OffCause::Died { .. }
        })
    ));
    assert!(!machine.residue);
}

#[test]
fn nothing_is_decided_before_a_restarted_agent_has_looked_for_the_process() {
    for verb in [Verb::Kill, start(), stop(), remove()] {
        let mut machine = after(&[start()]);
        machine.task = None;
        machine.restart(false);
        // The order comes before the answer to the search.
        machine
            .inputs
            .push_front(task::Input::Order(Box::new(order(1, 2, verb.clone()))));
        assert_eq!(machine.seen(), Happening::Running, "it is not off: it is not known yet");
        machine.settle();
        let ends = !matches!(verb, Verb::Start { .. });
        assert_eq!(machine.process.is_none(), ends, "{verb:?}");
    }
}

#[test]
fn a_start_that_is_refused_leaves_no_process_and_is_answered_when_it_is_dead() {
    let mut machine = Machine::new(0);
    machine.refuses = 1;
    machine.order(order(1, 1, start()));
    machine.settle();
    assert_eq!(machine.process, None);
    assert!(!machine.residue);
    assert!(
        matches!(machine.reports[..], [Happening::Refused { .. }]),
        "{:?}",
        machine.reports
    );
    assert!(off(&machine.seen()));
    machine.order(order(1, 2, start()));
    machine.settle();
    assert_eq!(machine.seen(), Happening::Running, "it can be started again");
}

#[test]
fn a_guest_that_should_run_is_asked_again_until_it_does() {
    let mut machine = after(&[start()]);
    machine.process = Some(Condition::Standing);
    machine.task = None;
    machine.refuses = 3;
    machine.restart(false);
    machine.settle();
    assert_eq!((machine.refuses, machine.seen()), (0, Happening::Running));
    // One whose user paused it is left alone.
    let mut machine = after(&[start(), Verb::Pause]);
    machine.refuses = 1;
    machine.inputs.push_back(task::Input::Timer(task::Timer::Retry));
    machine.settle();
    assert_eq!((machine.refuses, machine.seen()), (1, Happening::Paused));
}

#[test]
fn a_process_that_is_no_longer_heard_is_found_again_and_left_as_it_should_be() {
    for (verbs, seen, process) in scenarios() {
        let mut machine = after(&verbs);
        machine.loses_sight();
        assert_eq!(machine.turn(), process.is_some());
        if process.is_some() {
            assert_eq!(machine.seen(), seen, "it goes on, as far as is known");
        }
        machine.settle();
        assert_eq!(machine.process, process, "{verbs:?}");
    }
    // It ended meanwhile, unheard.
    let mut machine = after(&[start()]);
    machine.loses_sight();
    machine.process = None;
    machine.settle();
    assert!(off(&machine.seen()) && !machine.residue);
    // What comes while it is looked for waits, and is done.
    let mut machine = after(&[start()]);
    machine.loses_sight();
    machine.order(order(1, 2, Verb::Kill));
    machine.settle();
    assert_eq!(machine.process, None);
}

#[test]
fn an_order_is_done_though_the_process_is_lost_sight_of_at_any_point_of_it() {
    for (verbs, seen, process) in scenarios() {
        let (last, before) = verbs.split_last().expect("some");
        for turns in 0..6 {
            let mut machine = after(before);
            machine.order(order(1, u64::try_from(verbs.len()).expect("few"), last.clone()));
            for _ in 0..turns {
                machine.turn();
            }
            machine.loses_sight();
            machine.settle();
            let at = format!("{verbs:?}, lost after {turns} turns: {:?}", machine.seen());
            assert_eq!(machine.process, process, "{at}");
            assert!(machine.seen() == seen || off(&seen) && off(&machine.seen()), "{at}");
        }
    }
}

#[test]
fn a_process_that_cannot_be_ended_is_told_again_with_growing_pauses() {
    for verb in [Verb::Kill, remove()] {
        let mut machine = after(&[start()]);
        machine.clings = 12;
        machine.order(order(1, 2, verb));
        machine.settle();
        assert_eq!((machine.clings, machine.process), (0, None));
        let pauses: Vec<u64> = machine.pauses.iter().map(|pause| pause.0).collect();
        let grow = [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000];
        assert_eq!(pauses[..9], grow);
        assert_eq!(pauses.len(), 12, "never at once");
    }
    // So is one whose start was refused.
    let mut machine = Machine::new(0);
    (machine.refuses, machine.clings) = (1, 2);
    machine.order(order(1, 1, start()));
    machine.settle();
    assert_eq!((machine.process, machine.pauses.len()), (None, 2));
}

/// A restarted agent whose VM's process is there and does not answer.
fn deaf(before: &[Verb]) -> Machine {
    let mut machine = after(before);
    machine.task = None;
    machine.restart(false);
    machine.inputs.clear();
    machine
}

fn ends(machine: &Machine) -> bool {
    machine.task.as_ref().expect("an agent is there").ends_deaf()
}

#[test]
fn a_deaf_process_is_ended_by_an_order_that_is_new_and_by_no_other() {
    for (revision, verb, ended) in [
        (2, Verb::Kill, true),
        (2, remove(), true),
        (1, Verb::Kill, false),
        (2, stop(), false),
        (2, Verb::Pause, false),
    ] {
        let mut machine = deaf(&[start()]);
        assert!(!ends(&machine), "nobody ordered it");
        machine.order(order(1, revision, verb.clone()));
        machine.turn();
        assert_eq!(ends(&machine), ended, "{verb:?} {revision}");
    }
    // An older generation's word, and what was decided before the restart.
    let mut machine = deaf(&[start()]);
    machine.order(order(0, 2, Verb::Kill));
    machine.turn();
    assert!(!ends(&machine));
    let mut machine = after(&[start()]);
    machine.clings = 1;
    machine.order(order(1, 2, Verb::Kill));
    machine.turn();
    machine.task = None;
    machine.restart(false);
    machine.inputs.clear();
    assert!(ends(&machine));
}

#[test]
fn what_is_repeated_while_the_process_is_looked_for_leaves_room_for_an_order() {
    let mut machine = deaf(&[start()]);
    for _ in 0..200 {
        machine.inputs.push_back(task::Input::Timer(task::Timer::Retry));
    }
    machine.order(order(1, 2, Verb::Kill));
    while machine.turn() {}
    assert!(ends(&machine));
}
