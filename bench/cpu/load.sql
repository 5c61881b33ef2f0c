PRAGMA journal_mode = MEMORY;
PRAGMA synchronous = OFF;
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price INTEGER, class INTEGER);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
INSERT INTO item SELECT i, 'item ' || (i * 7919 % 40009), i * 2654435761 % 100003, i % 97 FROM n;
COMMIT;
CREATE INDEX by_name ON item (name);
CREATE INDEX by_price ON item (price);
SELECT class, count(*), sum(price), max(name) FROM item GROUP BY class ORDER BY 3 DESC LIMIT 5;
UPDATE item SET price = price + 1 WHERE id % 3 = 0;
SELECT count(*) FROM item a JOIN item b ON b.price = a.price + 5;
SELECT sum(length(name)), sum(price) FROM item WHERE name LIKE '%77%';
DELETE FROM item WHERE price BETWEEN 1000 AND 20000;
SELECT count(*), avg(price) FROM item;
