//! The desks at which this host's guests ask: each at its own tap, for as long as its VM is here.
//!
//! ```text
//!   tap ──▶ Questions ──▶ services::Desk ──▶ answers ──▶ tap
//!                             │   ▲
//!                             └───┴── what the guest was told: its seed's disk, read when it asks, forgotten soon after
//! ```
//!
//! A desk that breaks off is opened anew; a guest that asks too much is heard less.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

use model::{
    Definition, PortId,
    addressing::{AddressingMethod, MetadataAccess},
    order::PortUse,
};
use network::{Answered, Port, Questions};
use services::{Desk, Guest, KEY_BYTES, Key, Told};
use tokio::{
    io::Interest,
    task::{AbortHandle, JoinHandle},
    time::Instant,
};

use crate::{
    shared::Shared,
    template::{chain, named},
    tunnels::watched,
};

/// Frames that are taken at once; as many come only from a guest that floods, which is not heard for a moment then.
const FRAMES_AT_ONCE: usize = 64;
const FLOOD_PAUSE: Duration = Duration::from_millis(20);
/// Between the end of a desk that broke off and the next one.
const AGAIN: Duration = Duration::from_secs(5);

/// What all desks of a host share.
pub(crate) struct Common {
    key: Key,
    began: Instant,
}

impl Common {
    /// With a new key.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            key: Key::new(random::<KEY_BYTES>()?),
            began: Instant::now(),
        })
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What is answered at a port's tap, and so goes no further.
pub(crate) fn answered(port: &PortUse) -> Answered {
    match (port.addressing.method, port.addressing.metadata) {
        (AddressingMethod::Dhcp, _) => Answered::Dhcp,
        (AddressingMethod::Static, MetadataAccess::Off) => Answered::Nothing,
        (AddressingMethod::Static, _) => Answered::Metadata,
    }
}

/// A VM's desks.
#[derive(Debug, Default)]
pub(crate) struct Desks(BTreeMap<PortId, Opened>);

/// A desk that is open. Dropping it closes it.
#[derive(Debug)]
struct Opened {
    index: u32,
    task: AbortHandle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Desks {
    /// Opens those at a VM's ports that are not open yet.
    pub(crate) fn open<'p>(
        &mut self,
        shared: &Arc<Shared>,
        definition: &Definition,
        ports: impl Iterator<Item = &'p Port>,
    ) {
        for port in ports {
            let open = self.0.get(&port.id).is_some_and(|open| open.index == port.index);
            let guest = Guest::at(definition, shared.host(), port.id).filter(Guest::is_served);
            let Some(guest) = guest.filter(|_| !open) else { continue };
            let serving = serve(Arc::clone(shared), definition.clone(), guest, port.clone());
            let opened = Opened {
                index: port.index,
                task: tokio::spawn(serving).abort_handle(),
            };
            self.0.insert(port.id, opened);
        }
    }

    /// Nothing of the VM is left here.
    pub(crate) fn close(&mut self) {
        self.0.clear();
    }
}

/// Serves a guest until its port is gone.
async fn serve(shared: Arc<Shared>, definition: Definition, guest: Guest, port: Port) {
    loop {
        match at(&shared, &definition, &guest, &port).await {
            Ok(()) => return,
            Err(why) => {
                tracing::warn!(vm = %definition.vm, port = %port.id, why, "what the guest asks is not heard; tried again");
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn at(shared: &Arc<Shared>, definition: &Definition, guest: &Guest, port: &Port) -> Result<(), String> {
    let io = |error: io::Error| error.to_string();
    let mut questions = match shared.network.hear(port) {
        Ok(questions) => questions,
        Err(network::FrameError::Gone { .. }) => return Ok(()),
        Err(error) => return Err(chain(&error)),
    };
    let interest = Interest::READABLE.add(Interest::ERROR);
    let ready = questions.as_fd().try_clone_to_owned().map_err(io)?;
    let ready = watched(ready, interest).map_err(io)?;
    let (common, seed) = (&shared.desks, u64::from_ne_bytes(random().map_err(io)?));
    let mut desk = Desk::new(guest.clone(), common.key.clone(), seed, common.now());
    let mut told: Option<Reading> = None;
    let mut out = vec![];
    while !questions.is_ended() {
        let frames = hear(&mut questions, &mut desk, common, &mut out).map_err(io)?;
        desk.tick(common.now(), &mut out);
        if desk.asks() && told.is_none() {
            told = Some(Reading(tokio::spawn(read(Arc::clone(shared), definition.clone()))));
        }
        for frame in out.drain(..) {
            if let Err(error) = questions.answer(&frame) {
                tracing::debug!(port = %port.id, why = chain(&error), "an answer was not given");
            }
        }
        if frames == FRAMES_AT_ONCE {
            tokio::time::sleep(FLOOD_PAUSE).await;
            continue;
        }
        let due = desk.due(common.now()).map(|due| common.began + due);
        tokio::select! {
            ready = ready.ready(interest) => ready.map_err(io)?.clear_ready(),
            () = until(due) => {}
            answer = done(&mut told) => {
                told = None;
                desk.tell(answer, common.now(), &mut out);
            }
        }
    }
    Ok(())
}

/// Takes what waits, so much at once; how much.
fn hear(questions: &mut Questions, desk: &mut Desk, common: &Common, out: &mut Vec<Vec<u8>>) -> io::Result<usize> {
    for taken in 0..FRAMES_AT_ONCE {
        match questions.next_frame()? {
            Some(frame) => desk.take(frame, common.now(), out),
            None => return Ok(taken),
        }
    }
    Ok(FRAMES_AT_ONCE)
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// A seed that is being read.
struct Reading(JoinHandle<Option<Told>>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn done(reading: &mut Option<Reading>) -> Option<Told> {
    match reading {
        Some(reading) => (&mut reading.0).await.ok().flatten(),
        None => std::future::pending().await,
    }
}

/// What a VM's guest was told, as its seed's disk says; `None` where that cannot be read now.
async fn read(shared: Arc<Shared>, definition: Definition) -> Option<Told> {
    if definition.layout.seed.is_none() {
        return Some(Told {
            hostname: definition.name.to_string(),
            ..Told::default()
        });
    }
    let vm = definition.vm;
    let failed = |why: String| {
        tracing::warn!(%vm, why, "what the guest was told cannot be read; it asks in vain");
    };
    let pool = named(&shared, definition.pool)
        .map_err(|refusal| failed(refusal.message))
        .ok()?;
    let read = pool.run(move |pool| pool.read_seed(vm)).await;
    let files = match read {
        Ok(Ok(Some(files))) => files,
        Ok(Ok(None)) => {
            failed("its seed is not there".to_owned());
            return None;
        }
        Ok(Err(error)) => {
            failed(chain(&error));
            return None;
        }
        Err(error) => {
            failed(chain(&error));
            return None;
        }
    };
    Some(Told {
        hostname: files.hostname,
        public_keys: files.ssh_keys,
        user_data: files.user_data,
        network_config: Some(files.network_config),
    })
}
