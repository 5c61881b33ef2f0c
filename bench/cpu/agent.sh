# Reads names of loads, one a line, and runs them in turn.
echo "@READY"
while read -r name; do
  [ "$name" = quit ] && break
  sh /bench/items.sh "$name" 2>&1 </dev/null
done
