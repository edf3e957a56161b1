//! `godwit template build`: templates made on this machine, of Debian's packages, then uploaded.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use image::{
    debian,
    micro::{self, Artifact},
};
use model::Name;

use super::{create, upload::upload};
use crate::{
    commands::Session,
    exit::{Exit, Failure},
    follow::Wait,
    out::{self, live::Live, units},
};

/// A Debian image as old as this is built anew: it lacks a day's security updates.
const DEBIAN_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Lines of progress on their way to the terminal.
const LINES_WAITING_MAX: usize = 16;

/// What can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Buildable {
    /// Debian's or Ubuntu's kernel with busybox
    Micro,
    /// A Debian server: systemd, cloud-init, SSH, nginx; boots by BIOS and UEFI
    Debian,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// Debian 12
    Bookworm,
    /// Debian 13
    Trixie,
}

/// A template to build.
#[derive(Args, Debug)]
pub(crate) struct Build {
    /// What to build: `micro` is a kernel with a small web server, up in seconds; `debian` a whole server
    what: Buildable,
    /// Its name; without it, what is built
    #[arg(long)]
    name: Option<Name>,
    /// Debian's release; without it, bookworm
    #[arg(long, value_enum)]
    suite: Option<Suite>,
    /// Debian's archive; without it, those of this machine's apt
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Build Debian anew, though it was built here within a day
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    wait: Wait,
}

impl Build {
    /// Builds in this user's cache, then makes a template of the files.
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let word = match self.what {
            Buildable::Micro => "micro",
            Buildable::Debian => "debian",
        };
        if self.what != Buildable::Debian && (self.suite.is_some() || self.mirror.is_some() || self.fresh) {
            let message = "--suite, --mirror and --fresh are for `template build debian`";
            return Err(Failure::new(Exit::Usage, message));
        }
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| word.parse().expect("what can be built is a name"));
        let content = match self.what {
            Buildable::Micro => {
                let (directory, files) = build_micro().await?;
                send(session, &directory, &files.artifacts()).await?;
                files.content()
            }
            Buildable::Debian => {
                let (directory, files) = self.build_debian().await?;
                send(session, &directory, &[&files.disk]).await?;
                files.content()
            }
        };
        create(session, &name, &content, self.wait).await
    }

    async fn build_debian(&self) -> Result<(PathBuf, debian::DebianFiles), Failure> {
        let suite = match self.suite {
            None | Some(Suite::Bookworm) => debian::Suite::Bookworm,
            Some(Suite::Trixie) => debian::Suite::Trixie,
        };
        let cache = cache();
        let directory = cache.join(format!("debian-{}", suite.codename()));
        // Another archive may hold other packages.
        let again = !self.fresh && self.mirror.is_none();
        if let Some(files) = debian::DebianFiles::built(&directory, suite, DEBIAN_AGE_MAX).filter(|_| again) {
            out::note("the image that was built here within a day is used again; --fresh builds anew");
            return Ok((directory, files));
        }
        let sources = debian::Sources {
            suite,
            mirror: self.mirror.clone(),
            cache: cache.join("debian-packages"),
        };
        let (place, began) = (directory.clone(), Instant::now());
        let files = watched("building debian", move |tell| {
            debian::build(&place, &sources, &mut |progress| {
                tell(words(&progress.detail, progress.bytes_total));
            })
        })
        .await?;
        out::note(&format!(
            "Debian {} with Linux {}, {} packages: {} built in {} s",
            files.suite,
            files.kernel_release,
            files.packages,
            units::show_bytes(files.disk.size_bytes),
            began.elapsed().as_secs()
        ));
        Ok((directory, files))
    }
}

async fn build_micro() -> Result<(PathBuf, micro::TemplateFiles), Failure> {
    let cache = cache();
    let directory = cache.join("micro");
    let place = directory.clone();
    let files = watched("building micro", move |tell| {
        micro::build(
            &place,
            &micro::Sources::found(cache.join("packages")),
            &mut |progress| {
                tell(words(&progress.detail, progress.bytes_total));
            },
        )
    })
    .await?;
    Ok((directory, files))
}

fn words(detail: &str, bytes_total: u64) -> String {
    if bytes_total > 0 {
        format!("{detail}, {}", units::show_bytes(bytes_total))
    } else {
        detail.to_owned()
    }
}

/// Does slow work on a thread of its own, with what it tells on a line.
async fn watched<T, E>(
    what: &str,
    work: impl FnOnce(&mut dyn FnMut(String)) -> Result<T, E> + Send + 'static,
) -> Result<T, Failure>
where
    T: Send + 'static,
    E: std::error::Error + Send + 'static,
{
    let live = Live::new(what);
    let (tell, mut told) = tokio::sync::mpsc::channel::<String>(LINES_WAITING_MAX);
    let working = tokio::task::spawn_blocking(move || {
        // A line that is not drawn in time is not missed.
        work(&mut |line| drop(tell.try_send(line)))
    });
    while let Some(text) = told.recv().await {
        live.say(&text);
    }
    let done = working.await.map_err(|error| Failure::of(Exit::Failed, &error))?;
    done.map_err(|error| Failure::of(Exit::Failed, &error))
}

/// Uploads a template's files; they must still be what was built.
async fn send(session: &Session, directory: &Path, artifacts: &[&Artifact]) -> Result<(), Failure> {
    for artifact in artifacts {
        let path = directory.join(&artifact.file);
        if upload(&session.client, &path).await? != artifact.blob() {
            let message = format!("{} changed after it was built", path.display());
            return Err(
                Failure::new(Exit::Failed, message).hint("build one template at a time; `--fresh` builds Debian anew")
            );
        }
    }
    Ok(())
}

/// Where what was built is kept from one time to the next.
fn cache() -> PathBuf {
    let of = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = of("XDG_CACHE_HOME").or_else(|| of("HOME").map(|home| home.join(".cache")));
    base.unwrap_or_else(|| "/var/cache".into()).join("godwit")
}
