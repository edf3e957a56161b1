//! What a guest misses while it stands for a move: kept where it leaves, told to the other agent, given to it where it arrives.
//!
//! ```text
//!   Missed::Keep ──▶ Standstill ── Missed::HandOver ──▶ a task of its own ── link ──▶ other agent: give
//!                        └─ Missed::Drop: QEMU finds it all in its tap
//! ```
//!
//! Nothing waits for this and nothing depends on it: an agent that is killed takes what it kept along, and the frames are lost as if
//! the network had lost them.

use std::{
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use model::{Definition, Generation, HostId, Message, PortId, VmId};
use network::{Keeper, KeptFrame};
use task::{Decision, Role, Saved};
use tokio::{
    io::Interest,
    sync::mpsc,
    time::{Instant, timeout_at},
};
use wire::{GuestFrame, Missed, PortState, peer::MISSED_BYTES_MAX};

use crate::{
    ports::{self, Ports},
    portstate::{self, To},
    shared::Shared,
    template::chain,
    tunnels::watched,
};

/// Frames handed over for one port in one move: as many as a tap's queue holds.
const FRAMES_MAX: usize = 1000;
/// Their bytes.
const BYTES_MAX: usize = 4 << 20;
/// A hypervisor says that its guest stands when it has stood for a moment: what came so long before may have been missed. Some of that
/// was not; the guest gets it twice, which networks may always do.
const STOOD_BEFORE_US: i64 = 20_000;
/// It takes so long at most from being asked to saying so; on a busy machine more than the above.
const STANDING_TAKES_US: i64 = 200_000;
/// Of a guest that still runs the last so much is kept: the word that it stands may come to a busy agent so late.
const KEPT_US: i64 = 500_000;
/// Frames come here as long as some switch has not heard where the guest is. The port is gone long before this.
const LATE_MAX: Duration = Duration::from_secs(10);

/// What reaches a VM's ports here while its guest moves away.
#[derive(Debug, Default)]
pub(crate) struct Standstill {
    /// `None` when nothing is to be kept.
    ports: Option<Vec<(PortId, Keeper)>>,
    /// When the hypervisor was last asked for something for which it makes the guest stand, or may do so.
    asked_us: Option<i64>,
    /// Whether what is under way at its ports was said already.
    announced: bool,
}

/// What goes after a guest.
#[derive(Debug)]
pub(crate) enum Portion {
    /// Frames that it missed.
    Frames(Missed),
    /// What its port has of it.
    Port(PortState),
}

/// A hand-over, as those who hand frames over see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    pub(crate) vm: VmId,
    pub(crate) to: HostId,
    pub(crate) granted: Generation,
    pub(crate) stood_at_ms: i64,
}

impl Standstill {
    /// From now on the guest may stand at any time.
    pub(crate) fn keep(&mut self, shared: &Arc<Shared>, ports: &Ports, definition: &Definition, to: Option<To>) {
        if let Some(to) = to.filter(|_| !std::mem::replace(&mut self.announced, true)) {
            for port in &definition.ports {
                portstate::leave(shared, to, port.port, false);
            }
        }
        match &mut self.ports {
            None => self.ports = Some(begin(shared, ports, definition)),
            // It still runs: it had all that is older.
            Some(ports) => {
                for (port, keeper) in ports {
                    if let Err(error) = keeper.forget_before(now_us() - KEPT_US) {
                        tracing::debug!(%port, %error, "frames that the guest had are kept");
                    }
                }
            }
        }
    }

    /// The hypervisor is asked now for something for which it makes the guest stand, or may do so.
    pub(crate) fn asked(&mut self) {
        self.asked_us = Some(now_us());
    }

    /// The destination has the VM: it gets what was kept, and what still comes.
    pub(crate) fn hand_over(&mut self, shared: &Arc<Shared>, of: Move) {
        let from_us = missed_from_us(of.stood_at_ms.saturating_mul(1000), self.asked_us);
        for (port, keeper) in self.ports.take().unwrap_or_default() {
            let to = To {
                vm: of.vm,
                host: of.to,
                granted: of.granted,
            };
            portstate::leave(shared, to, port, true);
            tokio::spawn(hand_over(Arc::clone(shared), of, from_us, port, keeper));
        }
    }

    /// The guest stays.
    pub(crate) fn forget(&mut self) {
        self.announced = false;
        close(self.ports.take());
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.forget();
    }
}

fn begin(shared: &Shared, ports: &Ports, definition: &Definition) -> Vec<(PortId, Keeper)> {
    let network = &shared.network;
    let mut kept = vec![];
    for port in &definition.ports {
        // A restarted agent may still be looking for it aside.
        let found = match ports.known(port.port) {
            Some(known) => Ok(known.clone()),
            None => ports::look_for_one(network, port.port),
        };
        let keeper = found.and_then(|found| network.keep_frames(&found, port.mac).map_err(|error| chain(&error)));
        match keeper {
            Ok(keeper) => kept.push((port.port, keeper)),
            Err(why) => {
                tracing::warn!(vm = %definition.vm, port = %port.port, why, "what the guest misses in its move is lost");
            }
        }
    }
    kept
}

/// The kernel lets a packet socket's closer wait for its other processors; the runtime's threads do not.
fn close<T: Send + 'static>(kept: Option<T>) {
    if let (Some(kept), Ok(runtime)) = (kept, tokio::runtime::Handle::try_current()) {
        runtime.spawn_blocking(move || drop(kept));
    }
}

/// What may still be handed over for a port.
struct Budget {
    frames: usize,
    bytes: usize,
}

impl Budget {
    const fn whole() -> Self {
        Self {
            frames: FRAMES_MAX,
            bytes: BYTES_MAX,
        }
    }

    /// Whether a frame fits; the first that does not ends it, so that no later one overtakes.
    const fn take(&mut self, bytes: usize) -> bool {
        if self.frames == 0 || self.bytes < bytes {
            self.frames = 0;
            return false;
        }
        self.frames -= 1;
        self.bytes -= bytes;
        true
    }
}

/// Hands a port's frames over until the port is gone.
async fn hand_over(shared: Arc<Shared>, of: Move, from_us: i64, port: PortId, mut keeper: Keeper) {
    let mut budget = Budget::whole();
    let missed = Between {
        from_us,
        runs_us: now_us(),
    };
    if let Err(why) = hand_over_all(&shared, of, port, &missed, &mut keeper, &mut budget).await {
        tracing::warn!(vm = %of.vm, %port, why, "what the guest missed was not all handed over");
    }
    let frames = FRAMES_MAX - budget.frames;
    let bytes = BYTES_MAX - budget.bytes;
    tracing::info!(vm = %of.vm, %port, to = %of.to, frames, bytes, "what the guest missed was handed over");
    close(Some(keeper));
}

async fn hand_over_all(
    shared: &Shared,
    of: Move,
    port: PortId,
    missed: &Between,
    keeper: &mut Keeper,
    budget: &mut Budget,
) -> Result<(), String> {
    let end = Instant::now() + LATE_MAX;
    let interest = Interest::READABLE.add(Interest::ERROR);
    let ready = keeper.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let ready = watched(ready, interest).map_err(|error| error.to_string())?;
    let mut over = None;
    loop {
        // What is there when the port is gone is the last.
        let ended = keeper.is_ended();
        let frames = gather(keeper, missed, budget, &mut over).map_err(|error| error.to_string())?;
        if !frames.is_empty() {
            let missed = Missed {
                vm: of.vm,
                granted: of.granted,
                port,
                frames,
            };
            if !shared.peers.hand_over(of.to, Portion::Frames(missed)).await {
                return Err("there is no connection to the other agent".to_owned());
            }
        } else if ended || budget.frames == 0 {
            break;
        } else if !keeper.is_ended() {
            match timeout_at(end, ready.ready(interest)).await {
                Ok(Ok(mut ready)) => ready.clear_ready(),
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) => break,
            }
        }
    }
    close(Some(ready));
    Ok(())
}

/// From when on a guest may have missed frames that is said to stand since a moment, and was asked to at another.
fn missed_from_us(stood_us: i64, asked_us: Option<i64>) -> i64 {
    let asked = asked_us.map_or(stood_us, |asked| asked.max(stood_us - STANDING_TAKES_US));
    asked.min(stood_us - STOOD_BEFORE_US)
}

/// From when on frames were missed.
struct Between {
    from_us: i64,
    /// From here on the destination's port is open: it gets by itself what is for many.
    runs_us: i64,
}

impl Between {
    fn holds(&self, frame: &KeptFrame) -> bool {
        frame.at_us >= self.from_us && !(frame.is_for_many() && frame.at_us >= self.runs_us)
    }
}

/// The next frames, as many as are said at once. One that was read and has no place any more waits in `over`.
fn gather(
    keeper: &mut Keeper,
    missed: &Between,
    budget: &mut Budget,
    over: &mut Option<GuestFrame>,
) -> std::io::Result<Vec<GuestFrame>> {
    let mut frames: Vec<GuestFrame> = over.take().into_iter().collect();
    let mut bytes: usize = frames.iter().map(|frame| frame.0.len()).sum();
    while let Some(frame) = keeper.next_frame()? {
        if !missed.holds(&frame) {
            continue;
        }
        if !budget.take(frame.bytes.len()) {
            break;
        }
        bytes += frame.bytes.len();
        if bytes > MISSED_BYTES_MAX {
            *over = Some(GuestFrame(frame.bytes));
            break;
        }
        frames.push(GuestFrame(frame.bytes));
    }
    Ok(frames)
}

/// Gives what another agent hands over to the guests that came from it, in order.
pub(crate) async fn give_all(shared: Arc<Shared>, from: HostId, mut queue: mpsc::Receiver<Portion>) {
    while let Some(portion) = queue.recv().await {
        let shared = Arc::clone(&shared);
        let given = tokio::task::spawn_blocking(move || match portion {
            Portion::Frames(missed) => give(&shared, from, &missed),
            Portion::Port(state) => portstate::arrive(&shared, from, state),
        });
        if given.await.is_err() {
            return;
        }
    }
}

fn give(shared: &Shared, from: HostId, missed: &Missed) {
    let Missed { vm, port, .. } = *missed;
    if !shared
        .saved_of(vm)
        .is_some_and(|saved| is_its(&saved, from, missed.granted, port))
    {
        tracing::debug!(%vm, %port, %from, "frames for a guest that did not come from there are dropped");
        return;
    }
    let given = ports::look_for_one(&shared.network, port).and_then(|found| {
        let mut frames = missed.frames.iter();
        let given = frames.try_for_each(|frame| shared.network.give_frame(&found, &frame.0));
        given.map_err(|error| chain(&error))
    });
    match given {
        Ok(()) => tracing::debug!(%vm, %port, frames = missed.frames.len(), "the guest was given what it missed"),
        Err(why) => tracing::warn!(%vm, %port, %from, why, "the guest was not given all that it missed"),
    }
}

/// Whether the VM is here by the hand-over that is named, from that host, and the port is one of its own.
pub(crate) fn is_its(saved: &Saved, from: HostId, granted: Generation, port: PortId) -> bool {
    let arrived = Decision {
        source: from,
        granted,
        message: Message::Run,
    };
    let is_here = match &saved.role {
        Role::Holder => true,
        Role::Destination { state, .. } => state.may_run(),
        Role::None | Role::Source { .. } => false,
    };
    let ports = saved.definition.iter().flat_map(|definition| &definition.ports);
    is_here
        && saved.generation == granted
        && saved.decision == Some(arrived)
        && ports.into_iter().any(|its| its.port == port)
}

/// Now, by the clock that frames are stamped with.
fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use model::{
        BootId, Mac,
        host::Accelerator,
        layout::{Family, Layout},
        order::PortUse,
        template::Boot,
    };
    use uuid::Uuid;

    use super::*;

    const VM: VmId = VmId(Uuid::from_u128(1));
    const PORT: PortId = PortId(Uuid::from_u128(2));
    const SOURCE: HostId = HostId(Uuid::from_u128(3));
    const GRANTED: Generation = Generation(5);

    /// A VM that came from [`SOURCE`] by the hand-over at generation 5.
    fn arrived() -> Saved {
        let port = PortUse {
            port: PORT,
            mac: Mac([2; 6]),
            ip: Ipv4Addr::LOCALHOST,
            prefix: 24,
            gateway: None,
            mtu: 1500,
            v6: None,
            addressing: model::addressing::Addressing::default(),
            policy: model::PortPolicy::default(),
        };
        Saved {
            generation: Generation(5),
            role: Role::Holder,
            decision: Some(Decision {
                source: SOURCE,
                granted: Generation(5),
                message: Message::Run,
            }),
            definition: Some(Box::new(definition(port))),
            ..Saved::new(VM, BootId(Uuid::from_u128(9)))
        }
    }

    fn definition(port: PortUse) -> Definition {
        let layout = Layout {
            version: 1,
            family: Family::Q35,
            machine: "pc-q35-7.2".into(),
            accelerator: Accelerator::Tcg,
            cpu: "max".into(),
            vcpus: 1,
            memory_mib: 64,
            devices: vec![],
            seed: None,
        };
        Definition {
            template: None,
            vm: VM,
            name: "web1".parse().unwrap(),
            layout,
            boot: Boot::Bios,
            pool: model::PoolId(Uuid::from_u128(4)),
            volumes: vec![],
            ports: vec![port],
        }
    }

    #[test]
    fn frames_are_taken_only_for_a_vm_that_came_from_there_by_that_hand_over() {
        assert!(is_its(&arrived(), SOURCE, GRANTED, PORT));
        let stranger = HostId(Uuid::from_u128(8));
        assert!(!is_its(&arrived(), stranger, GRANTED, PORT), "another host");
        let port = PortId(Uuid::from_u128(7));
        assert!(!is_its(&arrived(), SOURCE, GRANTED, port), "another VM's port");
        let granted = Generation(4);
        assert!(!is_its(&arrived(), SOURCE, granted, PORT), "an older move");
        let later = Saved {
            generation: Generation(6),
            ..arrived()
        };
        assert!(!is_its(&later, SOURCE, GRANTED, PORT), "it was started anew since");
        let void = Saved {
            decision: arrived().decision.map(|decision| Decision {
                message: Message::Void,
                ..decision
            }),
            ..arrived()
        };
        assert!(!is_its(&void, SOURCE, GRANTED, PORT), "it did not come");
        let gone = Saved {
            role: Role::None,
            ..arrived()
        };
        assert!(!is_its(&gone, SOURCE, GRANTED, PORT), "it is not here");
        let native = Saved {
            decision: None,
            ..arrived()
        };
        assert!(!is_its(&native, SOURCE, GRANTED, PORT), "it never moved");
    }

    #[test]
    fn a_guest_missed_what_came_since_it_was_asked_to_stand_and_in_the_moments_before_it_said_so() {
        assert_eq!(missed_from_us(1_000_000, None), 980_000, "nobody asked");
        assert_eq!(missed_from_us(1_000_000, Some(999_000)), 980_000);
        assert_eq!(missed_from_us(1_000_000, Some(900_000)), 900_000);
        assert_eq!(
            missed_from_us(1_000_000, Some(10_000)),
            800_000,
            "asked for a copy, long ago"
        );
        assert_eq!(missed_from_us(1_000_000, Some(1_100_000)), 980_000, "it stood already");
    }

    #[test]
    fn what_was_missed_is_what_came_since_the_guest_stood_and_for_many_only_until_it_runs() {
        let frame = |at_us, first: u8| KeptFrame {
            at_us,
            bytes: [vec![0; network::VIRTIO_HEADER_BYTES], vec![first; 14]].concat(),
        };
        let missed = Between {
            from_us: 100,
            runs_us: 200,
        };
        let (one, many) = (0x52, 0xff);
        for (at_us, first, held) in [
            (99, one, false),
            (100, one, true),
            (100, many, true),
            (250, one, true),
            (250, many, false),
        ] {
            assert_eq!(missed.holds(&frame(at_us, first)), held, "{at_us} {first:x}");
        }
    }

    #[test]
    fn no_more_is_handed_over_than_is_allowed_and_nothing_overtakes() {
        let mut budget = Budget::whole();
        assert!((0..FRAMES_MAX).all(|_| budget.take(100)));
        assert!(!budget.take(100));
        let mut budget = Budget::whole();
        let large = 60_000;
        assert!((0..BYTES_MAX / large).all(|_| budget.take(large)));
        assert!(!budget.take(large), "its bytes are used up");
        assert!(!budget.take(1), "a later one that would fit");
    }
}
