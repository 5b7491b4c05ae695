//! Events as lines of text. A client that is a process appends each line with one `write` before it goes on, so what it did is known
//! up to the instant of its death.
//!
//! ```text
//! L <layer> <volume> <sectors> <parent cut or ->
//! I <time> <op> <client> <w|z|r|c> <l layer|c cut> <epoch> <first> <count>
//! C <time> <op> ok [<count>:<value>,...] | unknown | void
//! values: 0 | w<layer>.<op> | e<layer>.<op>.<sector> | t<op>
//! ```
//!
//! Invariant: [`parse`] of what [`line`] made gives the event back. A last line without its end, which a killed process may leave, is
//! left out; anything else that cannot be read is an error.

use super::{Action, Event, Layer, Op, Outcome, Run, Target, Value};
use anyhow::{Context, Result, bail};
use std::fmt::Write;

fn value_text(value: Value) -> String {
    match value {
        Value::Zero => "0".to_owned(),
        Value::Write { layer, op } => format!("w{layer}.{op}"),
        Value::Elsewhere { layer, op, sector } => format!("e{layer}.{op}.{sector}"),
        Value::Torn { op } => format!("t{op}"),
    }
}

/// The line of an event, with its end.
#[must_use]
pub(super) fn line(event: &Event) -> String {
    match event {
        Event::Layer { id, layer } => {
            let parent = layer.parent.map_or_else(|| "-".to_owned(), |cut| cut.to_string());
            format!("L {id} {} {} {parent}\n", layer.volume, layer.sectors)
        }
        Event::Invoke(op) => {
            let action = match op.action {
                Action::Write => 'w',
                Action::Zero => 'z',
                Action::Read => 'r',
                Action::Cut => 'c',
            };
            let target = match op.target {
                Target::Layer(layer) => format!("l {layer}"),
                Target::Cut(cut) => format!("c {cut}"),
            };
            let Op { id, client, epoch, first, count, invoked, .. } = op;
            format!("I {invoked} {id} {client} {action} {target} {epoch} {first} {count}\n")
        }
        Event::Complete { op, time, outcome } => match outcome {
            Outcome::Ok(found) => {
                let mut text = format!("C {time} {op} ok ");
                for (i, run) in found.iter().enumerate() {
                    let comma = if i == 0 { "" } else { "," };
                    // Writing to a string cannot fail.
                    let _ = write!(text, "{comma}{}:{}", run.count, value_text(run.value));
                }
                text.push('\n');
                text
            }
            Outcome::Unknown => format!("C {time} {op} unknown\n"),
            Outcome::Void => format!("C {time} {op} void\n"),
        },
    }
}

/// Reads the events of a log.
///
/// # Errors
/// A line that is none; its number is said.
pub fn parse(text: &str) -> Result<Vec<Event>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().enumerate();
    lines.map(|(i, line)| event(line).with_context(|| format!("line {} of the history: {line:?}", i + 1))).collect()
}

fn number<T: std::str::FromStr>(word: Option<&str>) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    word.context("a word is missing")?.parse().context("no number")
}

fn event(line: &str) -> Result<Event> {
    let mut words = line.split(' ');
    match words.next() {
        Some("L") => {
            let id = number(words.next())?;
            let (volume, sectors) = (number(words.next())?, number(words.next())?);
            let parent = match words.next() {
                Some("-") => None,
                word => Some(number(word)?),
            };
            Ok(Event::Layer { id, layer: Layer { volume, sectors, parent } })
        }
        Some("I") => {
            let (invoked, id, client) = (number(words.next())?, number(words.next())?, number(words.next())?);
            let action = match words.next() {
                Some("w") => Action::Write,
                Some("z") => Action::Zero,
                Some("r") => Action::Read,
                Some("c") => Action::Cut,
                other => bail!("no action: {other:?}"),
            };
            let target = match words.next() {
                Some("l") => Target::Layer(number(words.next())?),
                Some("c") => Target::Cut(number(words.next())?),
                other => bail!("no target: {other:?}"),
            };
            let (epoch, first, count) = (number(words.next())?, number(words.next())?, number(words.next())?);
            Ok(Event::Invoke(Op { id, client, action, target, epoch, first, count, invoked, completed: None, found: vec![] }))
        }
        Some("C") => {
            let (time, op) = (number(words.next())?, number(words.next())?);
            let outcome = match words.next() {
                Some("ok") => Outcome::Ok(runs(words.next().unwrap_or_default())?),
                Some("unknown") => Outcome::Unknown,
                Some("void") => Outcome::Void,
                other => bail!("no outcome: {other:?}"),
            };
            Ok(Event::Complete { op, time, outcome })
        }
        other => bail!("no event: {other:?}"),
    }
}

fn runs(text: &str) -> Result<Vec<Run>> {
    text.split(',').filter(|part| !part.is_empty()).map(run).collect()
}

fn run(text: &str) -> Result<Run> {
    let (count, value) = text.split_once(':').context("a run without ':'")?;
    let value = match value.split_at_checked(1) {
        Some(("0", "")) => Value::Zero,
        Some((kind, rest)) => {
            let mut parts = rest.split('.');
            match kind {
                "w" => Value::Write { layer: number(parts.next())?, op: number(parts.next())? },
                "e" => Value::Elsewhere { layer: number(parts.next())?, op: number(parts.next())?, sector: number(parts.next())? },
                "t" => Value::Torn { op: number(parts.next())? },
                _ => bail!("no value: {value:?}"),
            }
        }
        None => bail!("a run without a value"),
    };
    Ok(Run { count: count.parse().context("no number of sectors")?, value })
}
