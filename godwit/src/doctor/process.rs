//! Small programs that are asked for a line: their first line of output, or why there is none.

use std::{ffi::OsString, time::Duration};

use image::process::{Run, RunError};

use crate::exit::chain;

/// Such programs answer in milliseconds.
const DEADLINE: Duration = Duration::from_secs(2);

/// The first line that a program prints.
pub(super) fn first_line(program: &str, arguments: &[&str]) -> Result<String, String> {
    let run = arguments
        .iter()
        .fold(Run::new(program, DEADLINE), |run, word| run.arg(OsString::from(word)));
    let output = run.output().map_err(|error: RunError| chain(&error))?;
    let text = String::from_utf8_lossy(&output);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
