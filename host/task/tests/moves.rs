//! A VM that moves between two machines: it arrives; it stays when it is cancelled in time; and whichever agent dies before whichever
//! effect, in the end one host has it and the other nothing.

mod machine;

use driver::{Condition, Happened};
use machine::{Machine, Outside, copied, definition, endpoint, host, nearly, order, start, terms};
use model::{
    Message,
    order::{Happening, Verb},
};
use task::{Input, Missed, Peer, Role, Timer, Tunnel, TunnelEvent};

/// Two machines, and the copy between them.
struct Pair {
    a: Machine,
    b: Machine,
    copying: bool,
    sent: bool,
    /// Turns after which both are told to cancel.
    cancel_in: Option<u32>,
    revision: u64,
}

impl Pair {
    /// The VM runs on A; B is told to receive it.
    fn new() -> Self {
        let (mut a, mut b) = (Machine::new(0), Machine::new(1));
        a.order(order(1, 1, start()));
        a.settle();
        let receive = Verb::Receive {
            terms: terms(),
            definition: definition(),
        };
        b.disk = true;
        b.order(order(2, 2, receive));
        Self {
            a,
            b,
            copying: false,
            sent: false,
            cancel_in: None,
            revision: 3,
        }
    }

    fn next(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    /// What the controller does: tells A to send once B waits, and cancels when it is to.
    fn control(&mut self) {
        let receives = self
            .b
            .reports
            .iter()
            .any(|what| matches!(what, Happening::Receiving { .. }));
        if receives && !self.sent {
            self.sent = true;
            let send = Verb::Send {
                terms: terms(),
                to: endpoint(),
            };
            self.a.order(order(1, 3, send));
        }
        self.cancel_in = match self.cancel_in {
            Some(0) => {
                self.cancel();
                None
            }
            other => other.map(|left| left - 1),
        };
    }

    fn cancel(&mut self) {
        let cancel = Verb::Cancel { terms: terms() };
        let revision = self.next();
        if self.sent {
            self.a.order(order(1, revision, cancel));
        } else {
            self.b.order(order(2, revision, cancel));
        }
    }

    /// Carries words and memory over.
    fn route(&mut self) {
        for outside in std::mem::take(&mut self.a.outside) {
            match outside {
                Outside::Word(word) => hear(&mut self.b, 0, word),
                Outside::Copy => {
                    self.copying = true;
                    self.a.inputs.push_back(Input::Driver(nearly()));
                }
                Outside::Stood if self.copying => {
                    self.copying = false;
                    if self.b.process == Some(Condition::Loading) {
                        self.b.process = Some(Condition::Standing);
                        self.b.inputs.push_back(Input::Driver(Happened::Loaded));
                    }
                    if self.a.process.is_some() {
                        self.a.process = Some(Condition::Sent);
                        self.a.inputs.push_back(Input::Driver(copied()));
                    }
                }
                // The stream ends with a cancel; an agent that asks after it hears how it ended.
                Outside::CopyCancelled => self.asked_after_copy(),
                Outside::Stood | Outside::Closed => {}
            }
        }
        for outside in std::mem::take(&mut self.b.outside) {
            if let Outside::Word(word) = outside {
                hear(&mut self.a, 1, word);
            }
        }
    }

    fn asked_after_copy(&mut self) {
        self.copying = false;
        if self.a.process == Some(Condition::Sent) {
            self.a.inputs.push_back(Input::Driver(copied()));
            return;
        }
        let reason = "it ended".to_owned();
        self.a
            .inputs
            .push_back(Input::Driver(Happened::CopyFailed { reason: reason.clone() }));
        if self.b.process == Some(Condition::Loading) {
            self.b.inputs.push_back(Input::Driver(Happened::LoadFailed { reason }));
        }
    }

    /// Goes on until nothing more happens; agents that died come back once nothing else is left to do.
    fn settle(&mut self, rebooted: bool) {
        for turns in 0..600 {
            self.control();
            let turned = [self.a.turn(), self.b.turn()];
            self.route();
            for machine in [&mut self.a, &mut self.b] {
                if machine.task.is_none() {
                    machine.inputs.clear();
                }
            }
            self.check();
            if turned.contains(&true) || !self.a.inputs.is_empty() || !self.b.inputs.is_empty() {
                continue;
            }
            if self.a.task.is_none() || self.b.task.is_none() {
                self.a.restart(rebooted);
                self.b.restart(rebooted);
                if self.a.task.is_some() && !self.sent {
                    // A container of which nobody was told is given up: so is the move.
                    self.cancel();
                    self.sent = true;
                }
                continue;
            }
            // A word that nobody can answer any more is repeated for ever.
            if !self.a.timer() && !self.b.timer() || rebooted && self.b.timers.is_empty() && turns > 400 {
                return;
            }
        }
        unreachable!("it does not come to rest");
    }

    fn check(&self) {
        let both = self.a.process == Some(Condition::Running) && self.b.process == Some(Condition::Running);
        assert!(!both, "two guests run");
    }

    fn runs(&self) -> [bool; 2] {
        [&self.a, &self.b].map(|machine| machine.process == Some(Condition::Running))
    }
}

fn hear(machine: &mut Machine, from: u128, word: Peer) {
    if machine.task.is_some() {
        let word = Peer {
            host: host(from),
            ..word
        };
        machine.inputs.push_back(Input::Peer(word));
    }
}

#[test]
fn a_vm_arrives_and_nothing_is_left_behind() {
    let mut pair = Pair::new();
    pair.settle(false);
    assert_eq!(pair.runs(), [false, true]);
    assert!(pair.a.process.is_none() && !pair.a.residue);
    assert!(
        matches!(pair.a.seen(), Happening::TornDown { .. }),
        "{:?}",
        pair.a.seen()
    );
    assert_eq!(pair.b.seen(), Happening::Running);
    assert!(pair.a.disk && pair.b.disk, "the disk is shared and stays");
}

#[test]
fn what_a_guest_misses_is_kept_from_before_it_stands_and_handed_over_only_when_the_destination_has_it() {
    let mut pair = Pair::new();
    pair.settle(false);
    let (last, before) = pair.a.missed.split_last().unwrap();
    let handed_over = Missed::HandOver {
        to: host(1),
        granted: terms().granted,
        stood_at_ms: 1,
    };
    assert_eq!(*last, handed_over);
    assert!(
        before.len() >= 2 && before.iter().all(|missed| *missed == Missed::Keep),
        "{before:?}"
    );
    assert_eq!(pair.b.missed, [], "whoever arrives misses nothing here");

    for turns in 0..60 {
        let mut pair = Pair::new();
        pair.cancel_in = Some(turns);
        pair.settle(false);
        let handed_over = pair
            .a
            .missed
            .iter()
            .any(|missed| matches!(missed, Missed::HandOver { .. }));
        assert_eq!(handed_over, pair.runs()[1], "cancelled after {turns} turns");
        if !handed_over && !pair.a.missed.is_empty() {
            assert_eq!(
                pair.a.missed.last(),
                Some(&Missed::Drop),
                "cancelled after {turns} turns"
            );
        }
    }
}

#[test]
fn a_cancel_at_any_stage_leaves_the_vm_on_one_host_running() {
    let mut stayed = 0;
    for turns in 0..60 {
        let mut pair = Pair::new();
        pair.cancel_in = Some(turns);
        pair.settle(false);
        let runs = pair.runs();
        assert!(runs[0] != runs[1], "cancelled after {turns} turns: {runs:?}");
        let other = if runs[0] { &pair.b } else { &pair.a };
        assert!(
            other.process.is_none() && !other.residue,
            "cancelled after {turns} turns: something is left"
        );
        stayed += u32::from(runs[0]);
    }
    assert!((5..55).contains(&stayed), "it stayed {stayed} times of 60");
}

#[test]
fn whichever_agent_dies_before_whichever_effect_one_host_runs_the_vm() {
    for side in [0, 1] {
        let mut points = 0;
        loop {
            let mut pair = Pair::new();
            let machine = if side == 0 { &mut pair.a } else { &mut pair.b };
            machine.dies_in = Some(points);
            pair.settle(false);
            let machine = if side == 0 { &pair.a } else { &pair.b };
            if machine.dies_in.is_some() {
                break;
            }
            let at = format!("agent {side} dead before effect {points}");
            let runs = pair.runs();
            assert!(
                runs[0] != runs[1],
                "{at}: {runs:?}, {:?} {:?}",
                pair.a.seen(),
                pair.b.seen()
            );
            let other = if runs[0] { &pair.b } else { &pair.a };
            assert!(
                other.process.is_none() && !other.residue,
                "{at}: {runs:?}, left: {:?} {} {:?}",
                other.process,
                other.residue,
                other.reports
            );
            points += 1;
        }
        assert!(points >= 10, "side {side} has only {points} effects");
    }
}

#[test]
fn a_host_that_loses_power_at_any_point_never_makes_two_of_it() {
    for side in [0, 1] {
        for points in 0..40 {
            let mut pair = Pair::new();
            let machine = if side == 0 { &mut pair.a } else { &mut pair.b };
            machine.dies_in = Some(points);
            // Every step checks that not both run; without power nothing of the old boot may be taken for alive.
            pair.settle(true);
            let machine = if side == 0 { &pair.a } else { &pair.b };
            assert!(
                machine.dies_in.is_some() || !pair.runs()[side],
                "a guest of the old boot runs"
            );
        }
    }
}

#[test]
fn a_record_says_how_it_was_when_it_was_decided() {
    let mut pair = Pair::new();
    pair.cancel_in = Some(6);
    let mut roles = vec![];
    for _ in 0..200 {
        pair.control();
        for machine in [&mut pair.a, &mut pair.b] {
            machine.turn();
        }
        roles.extend(pair.b.records.drain(..).map(|saved| saved.role));
        pair.route();
    }
    let void = roles.iter().position(|role| {
        matches!(
            role,
            Role::Destination {
                state: handover::Destination::Void { .. },
                ..
            }
        )
    });
    let none = roles.iter().rposition(|role| *role == Role::None);
    assert!(
        void.is_some() && void < none,
        "the decision has a record of its own: {roles:?}"
    );
}

#[test]
fn whichever_host_is_to_run_it_asks_again_when_its_hypervisor_refuses() {
    for turns in [None, Some(6)] {
        let mut pair = Pair::new();
        pair.a.refuses = 0;
        pair.b.refuses = 3;
        pair.cancel_in = turns;
        pair.settle(false);
        assert_eq!(pair.runs().iter().filter(|runs| **runs).count(), 1, "{:?}", pair.runs());
    }
}

/// Hears inputs at one machine and gives back the words it says.
#[test]
fn a_stand_a_look_or_a_cancel_that_is_refused_is_asked_again() {
    // What stands the guest.
    let mut pair = Pair::new();
    pair.a.denies = 3;
    for _ in 0..50 {
        pair.control();
        while pair.a.turn() | pair.b.turn() {
            pair.route();
        }
        if pair.a.timers.remove(&Timer::Retry) {
            pair.a.inputs.push_back(Input::Timer(Timer::Retry));
        }
    }
    assert_eq!((pair.runs(), pair.a.denies), ([false, true], 0));
    // What a restarted agent asks of the copy, and a cancel.
    for cancelled in [false, true] {
        let mut machine = source(false);
        machine.task = None;
        machine.inputs.clear();
        machine.timers.clear();
        machine.denies = 2;
        machine.restart(false);
        if cancelled {
            machine.order(order(1, 4, Verb::Cancel { terms: terms() }));
        }
        for _ in 0..10 {
            while machine.turn() {}
            if machine.timers.remove(&Timer::Retry) {
                machine.inputs.push_back(Input::Timer(Timer::Retry));
            }
        }
        assert_eq!(machine.denies, 0, "cancelled: {cancelled}");
        let asked = machine
            .outside
            .iter()
            .any(|wish| matches!(wish, Outside::CopyCancelled));
        assert!(asked, "cancelled: {cancelled}");
    }
}

fn said(machine: &mut Machine, inputs: Vec<Input>) -> Vec<Message> {
    machine.inputs.extend(inputs);
    while machine.turn() {}
    let words = std::mem::take(&mut machine.outside);
    words
        .into_iter()
        .filter_map(|outside| match outside {
            Outside::Word(word) => Some(word.message),
            _ => None,
        })
        .collect()
}

fn release() -> Input {
    Input::Peer(Peer {
        host: host(0),
        granted: terms().granted,
        message: Message::Release,
    })
}

fn waiting(run: bool) -> Machine {
    let mut b = Machine::new(1);
    b.disk = true;
    let terms = model::Terms { run, ..terms() };
    let definition = definition();
    b.order(order(2, 2, Verb::Receive { terms, definition }));
    while b.turn() {}
    assert!(matches!(b.reports.last(), Some(Happening::Receiving { .. })));
    b
}

#[test]
fn a_paused_arrival_says_that_it_has_come() {
    let mut b = waiting(false);
    b.process = Some(Condition::Standing);
    let words = said(&mut b, vec![Input::Driver(Happened::Loaded), release()]);
    assert_eq!(words, [Message::Run]);
    assert_eq!(b.seen(), Happening::Paused);
}

#[test]
fn a_restarted_destination_that_has_everything_does_not_miss_its_tunnel() {
    let mut b = waiting(true);
    b.process = Some(Condition::Standing);
    b.task = None;
    b.inputs.clear();
    b.restart(false);
    let reason = "it is gone".to_owned();
    let words = said(&mut b, vec![Input::Tunnel(TunnelEvent::Failed { reason }), release()]);
    assert_eq!(words, [Message::Ask, Message::Run]);
    assert_eq!(b.seen(), Happening::Running);
}

#[test]
fn a_source_that_waits_for_ever_is_cleared_by_a_later_generation() {
    for (generation, clears) in [(3, false), (4, true)] {
        let mut a = Machine::new(0);
        a.order(order(1, 1, start()));
        a.settle();
        let to = endpoint();
        a.order(order(1, 3, Verb::Send { terms: terms(), to }));
        while a.turn() {}
        let words = said(&mut a, vec![Input::Driver(nearly())]);
        assert_eq!(words, [Message::Release]);
        assert_eq!(a.seen(), Happening::Released);
        a.order(order(generation, 4, Verb::Remove { volumes: vec![] }));
        while a.turn() {}
        assert_eq!(a.process.is_none(), clears);
        assert_eq!(a.seen() == Happening::Removed, clears, "{:?}", a.seen());
        assert!(a.disk, "its disks are another's");
    }
}

#[test]
fn a_side_that_loses_sight_of_its_process_at_any_point_leaves_one_runner() {
    for side in [0, 1] {
        for at in 0..40 {
            let mut pair = Pair::new();
            for _ in 0..at {
                pair.control();
                pair.a.turn();
                pair.b.turn();
                pair.route();
                pair.check();
            }
            let machine = if side == 0 { &mut pair.a } else { &mut pair.b };
            machine.loses_sight();
            // A container of which nobody was told is given up: so is the move.
            if side == 1 && !pair.sent && pair.b.process.is_some() {
                pair.cancel();
                pair.sent = true;
            }
            pair.settle(false);
            let runs = pair.runs();
            assert!(runs[0] != runs[1], "side {side} after {at} turns: {runs:?}");
            let other = if runs[0] { &pair.b } else { &pair.a };
            assert!(
                other.process.is_none() && !other.residue,
                "side {side} after {at} turns"
            );
        }
    }
}

#[test]
fn a_restarted_destination_still_says_where_it_receives() {
    let mut b = waiting(true);
    let before = b.seen();
    assert!(matches!(before, Happening::Receiving { .. }));
    b.task = None;
    b.inputs.clear();
    b.restart(false);
    assert_eq!(b.seen(), before, "before it has found anything");
    b.settle();
}

/// A source that copies, or has released.
fn source(released: bool) -> Machine {
    let mut a = Machine::new(0);
    a.order(order(1, 1, start()));
    a.settle();
    a.order(order(
        1,
        3,
        Verb::Send {
            terms: terms(),
            to: endpoint(),
        },
    ));
    while a.turn() {}
    if released {
        assert_eq!(said(&mut a, vec![Input::Driver(nearly())]), [Message::Release]);
    }
    a
}

#[test]
fn a_source_that_has_not_released_is_ended_by_order_and_cannot_release_then() {
    let mut a = source(false);
    a.order(order(1, 4, Verb::Kill));
    let words = said(&mut a, vec![Input::Driver(nearly()), Input::Driver(copied())]);
    assert_eq!((words, a.process), (vec![], None));
    assert!(matches!(a.seen(), Happening::Off { .. }), "{:?}", a.seen());
    assert!(!a.residue);
    // What was released is not: only the destination knows what became of it.
    let mut a = source(true);
    a.order(order(1, 4, Verb::Kill));
    while a.turn() {}
    assert_eq!(a.seen(), Happening::Released);
    assert!(a.process.is_some());
}

/// The agent restarts, and the process is there and does not answer.
fn deafened(mut machine: Machine) -> Machine {
    machine.task = None;
    machine.inputs.clear();
    machine.timers.clear();
    machine.restart(false);
    machine.inputs.clear();
    machine
}

fn ends(machine: &mut Machine, input: Input) -> bool {
    machine.inputs.push_back(input);
    while machine.turn() {}
    machine.task.as_ref().expect("an agent is there").ends_deaf()
}

fn ordered(revision: u64, verb: Verb) -> Input {
    Input::Order(Box::new(order(2, revision, verb)))
}

#[test]
fn a_deaf_destination_is_ended_by_its_deadline_or_a_cancel_and_is_void() {
    let cancel = || ordered(5, Verb::Cancel { terms: terms() });
    for input in [cancel(), Input::Timer(task::Timer::Deadline)] {
        let mut b = deafened(waiting(true));
        assert!(b.timers.contains(&task::Timer::Deadline), "its deadline goes on");
        // A word of the source, and an old order, are no reason.
        assert!(!ends(&mut b, release()));
        assert!(!ends(&mut b, ordered(1, Verb::Cancel { terms: terms() })));
        assert!(ends(&mut b, input));
        b.process = None;
        let words = said(
            &mut b,
            vec![Input::Driver(Happened::NotUp {
                reason: "gone".to_owned(),
            })],
        );
        assert!(
            words.contains(&Message::Void) && !words.contains(&Message::Run),
            "{words:?}"
        );
        let decision = b.journal.as_ref().and_then(|saved| saved.decision);
        assert_eq!(decision.map(|decision| decision.message), Some(Message::Void));
    }
}

#[test]
fn a_deaf_destination_that_is_to_run_is_left_alone() {
    let mut b = waiting(true);
    b.process = Some(Condition::Standing);
    b.refuses = 1;
    assert_eq!(
        said(&mut b, vec![Input::Driver(Happened::Loaded), release()]),
        [Message::Run]
    );
    let mut b = deafened(b);
    assert!(!ends(&mut b, Input::Timer(task::Timer::Deadline)));
    assert!(!ends(&mut b, ordered(5, Verb::Cancel { terms: terms() })));
}

#[test]
fn a_deaf_source_is_ended_by_a_kill_before_its_release_and_by_the_destinations_run_after() {
    let word = |message| {
        Input::Peer(Peer {
            host: host(1),
            granted: terms().granted,
            message,
        })
    };
    let mut a = deafened(source(false));
    assert!(!ends(&mut a, word(Message::Run)), "nothing was released");
    assert!(
        !ends(&mut a, ordered(5, Verb::Cancel { terms: terms() })),
        "its guest may run on"
    );
    assert!(ends(&mut a, ordered(6, Verb::Kill)));
    let mut a = deafened(source(true));
    assert!(!ends(&mut a, word(Message::Void)), "it is to run again");
    assert!(!ends(&mut a, ordered(5, Verb::Kill)));
    assert!(ends(&mut a, word(Message::Run)));
}

#[test]
fn while_the_destinations_agent_does_not_hear_the_guest_runs_and_the_stream_is_held() {
    let mut pair = Pair::new();
    pair.a.peer_up = false;
    for _ in 0..200 {
        pair.control();
        pair.a.turn();
        pair.b.turn();
        pair.route();
    }
    assert_eq!(pair.a.process, Some(Condition::Running), "it was asked to stand");
    assert_eq!(pair.a.flows, []);
    pair.a.inputs.push_back(Input::PeerLink { up: true });
    pair.a.turn();
    assert_eq!(pair.a.flows, [Tunnel::Flow]);
    pair.a.inputs.push_back(Input::PeerLink { up: false });
    pair.a.turn();
    assert_eq!(pair.a.flows, [Tunnel::Flow, Tunnel::Hold]);
    // A restarted agent knows nothing of the connection until it is told.
    pair.a.inputs.push_back(Input::PeerLink { up: true });
    pair.a.turn();
    pair.a.inputs.push_back(Input::Driver(nearly()));
    pair.settle(false);
    assert_eq!(pair.runs(), [false, true]);
    assert_eq!(
        pair.a.flows.last(),
        Some(&Tunnel::Free),
        "what was given away flows to its end"
    );
}

#[test]
fn a_move_that_waits_for_the_destinations_agent_too_long_is_given_up_and_says_so() {
    let mut pair = Pair::new();
    pair.a.peer_up = false;
    for _ in 0..200 {
        pair.control();
        pair.a.turn();
        pair.b.turn();
        pair.route();
    }
    pair.a.inputs.push_back(Input::Timer(Timer::Deadline));
    pair.settle(false);
    assert_eq!(pair.runs(), [true, false]);
    let kept = pair.a.reports.iter().find_map(|what| match what {
        Happening::Kept { reason } => Some(reason.message.clone()),
        _ => None,
    });
    let kept = kept.expect("it is told");
    assert!(
        kept.contains("no connection to the destination's agent") && kept.contains("web1"),
        "{kept}"
    );
}
